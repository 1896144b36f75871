"""What a run found: told while it runs, and as tables at its end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.checks import VIOLATIONS, Books, Violation, ended_by_nothing
from tests.faults.plans import KINDS, PROVIDER_KINDS
from tests.faults.rounds import Stage

_UNRECORDED = "served, unrecorded: "


@dataclass(kw_only=True)
class Totals:
    """The figures of all rounds so far."""

    seed: int
    rounds: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    violated_tokens: Counter[str] = field(default_factory=Counter)

    def add(self, stage: Stage, books: Books, violations: list[Violation], seconds: float) -> None:
        """Count a round in."""
        begun = books.tasks_admitted | {serving.task_id for serving in books.servings}
        self.rounds += 1
        self.seconds += seconds
        self.faults.update(injected.kind for injected in stage.injected)
        self.faults.update(s.behaviour for s in books.servings if s.behaviour in PROVIDER_KINDS)
        self.outcomes.update(stage.outcomes.values())
        for violation in violations:
            self.violations[violation.kind] += 1
            self.violated_tokens[violation.kind] += violation.tokens
        self.figures.update(
            {
                "tasks": len(stage.plan.tasks),
                "provider calls served": len(books.servings),
                "calls billed": sum(serving.billed > 0 for serving in books.servings),
                "calls recorded": len(books.charges),
                "calls recorded late": books.late,
                "tokens billed": sum(serving.billed for serving in books.servings),
                "tokens recorded": sum(charge.tokens_total for charge in books.charges),
                "tokens billed over what was asked": sum(serving.over for serving in books.servings),
                "calls bought twice": len(books.charges) - len({(c.task_id, c.call) for c in books.charges}),
                "messages lost by the broker": sum(task not in begun for task in ended_by_nothing(stage)),
                "holds taken back by expiry": books.expired,
                "looks at the books in the midst": stage.audit.looks,
                "rounds not settled in time": int(not stage.settled),
                "messages left in these": stage.messages_left,
            }
        )
        for call in books.unrecorded:
            self.figures[_UNRECORDED + call.cause] += 1
            self.figures[f"{_UNRECORDED}{call.cause}, tokens"] += call.serving.billed
            if call.named:
                self.figures["of these, named by a row of calls in flight"] += 1


def describe_round(stage: Stage, violations: list[Violation], seconds: float) -> str:
    """Return a line for a round; with what to know of it, where an invariant was violated."""
    plan = stage.plan
    state = f"{len(violations)} violations" if violations else "ok"
    unsettled = "" if stage.settled else f", not settled in time: {stage.messages_left} messages are left"
    size = f"{len(plan.tasks)} tasks, {len(stage.injected)} faults, {seconds:.1f} s"
    line = f"round {plan.number}: {size}: {state}{unsettled}"
    if not violations:
        return line
    lines = [line, f"  seed {plan.seed}, round {plan.number}. Play it again: {plan.replay}"]
    lines += [f"  {violation.kind}, {violation.tokens} tokens: {violation.detail}" for violation in violations]
    lines += ["  faults:", *(f"    {injected}" for injected in stage.injected)]
    return "\n".join(lines)


def as_markdown(totals: Totals) -> str:
    """Return the tables of a run, with the command that makes them."""
    faults = sum(totals.faults.values())
    command = f"`make faults SEED={totals.seed} ROUNDS={totals.rounds}`"
    parts = [
        f"{command}: {totals.rounds} rounds, {faults} faults, {totals.seconds / 60:.0f} minutes.",
        _table(
            ("violation", "meaning", "times", "tokens"),
            [
                (kind.replace("_", " "), meaning, totals.violations[kind], totals.violated_tokens[kind])
                for kind, meaning in VIOLATIONS.items()
            ],
        ),
        _table(
            ("fault", "times"),
            [(kind.replace("_", " "), totals.faults[kind]) for kind in (*KINDS, *PROVIDER_KINDS)],
        ),
        _table(("task ended", "tasks"), totals.outcomes.most_common()),
        _table(("figure", "count"), list(totals.figures.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    numeric = [bool(rows) and isinstance(cell, int) for cell in (rows[0] if rows else head)]
    rule = "|".join(" ---: " if number else " --- " for number in numeric)
    lines = [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
