"""The report of a run: lines while it runs, and tables at its end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.books import Books
from tests.faults.checks import ended_by_nothing, extensions_of, lost_by_transport
from tests.faults.kinds import GRAPH_KINDS, KINDS, PROVIDER_KINDS
from tests.faults.ledger import Serving
from tests.faults.stages import Stage
from tests.faults.violations import VIOLATIONS, Violation

_ALL_KINDS = (*KINDS, *PROVIDER_KINDS, *GRAPH_KINDS)
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
        """Add a round's figures."""
        self.rounds += 1
        self.seconds += seconds
        self.faults.update(injected.kind for injected in stage.injected)
        self.faults.update(request.behaviour for request in (*books.servings, *books.postings))
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
                "tokens billed above the requested maximum": sum(serving.over for serving in books.servings),
                "calls bought twice": len(books.charges) - len({(c.task_id, c.fingerprint) for c in books.charges}),
                "messages lost by the broker": sum(
                    lost_by_transport(stage, books, task) for task in ended_by_nothing(stage)
                ),
                "results lost of finished work": sum(task in books.tasks_completed for task in ended_by_nothing(stage)),
                "holds expired": books.expired,
                "balance checks during rounds": stage.audit.looks,
                "rounds not settled in time": int(not stage.settled),
                "messages left in these rounds": stage.messages_left,
            }
        )
        self.figures.update(_figures_of_requests(stage))
        self.figures.update(_figures_of_streams(books))
        extended = [extension["granted"] for extensions in extensions_of(stage).values() for extension in extensions]
        self.figures.update({"extensions granted": sum(extended), "extensions denied": extended.count(False)})
        self.figures.update(_figures_of_effects(books))
        for call in books.unrecorded:
            self.figures[_UNRECORDED + call.cause] += 1
            self.figures[f"{_UNRECORDED}{call.cause}, tokens"] += call.serving.billed
            if call.named:
                self.figures["of these, named by a call intent"] += 1


def _figures_of_requests(stage: Stage) -> dict[str, int]:
    tasks = stage.plan.spendings
    results = [stage.results.get(task.task_id) for task in tasks if task.works]
    return {
        "tasks with calls in threads": sum(task.style == "threads" for task in tasks),
        "tasks with an `async def` body": sum(task.style == "async" for task in tasks),
        "requests with the id of another": sum(task.request > 1 for task in tasks),
        "requests sent when another with their id had its result": len(stage.sent_after),
        "tasks done that worked longer than a hold lives": sum(result is not None for result in results),
    }


def _figures_of_streams(books: Books) -> dict[str, int]:
    streams = [serving for serving in books.servings if serving.streamed and serving.billed]
    charged = {charge.model_name for charge in books.charges}

    def unseen(serving: Serving) -> int:
        return serving.billed - serving.chargeable if serving.model_name in charged else 0

    return {
        "streams": len(streams),
        "streams broken": sum(not (serving.complete or serving.closed_early) for serving in streams),
        "streams ended early by their task": sum(serving.closed_early for serving in streams),
        "recorded streams: tokens billed that the task never received": sum(map(unseen, streams)),
    }


def _figures_of_effects(books: Books) -> dict[str, int]:
    statuses = Counter(row.status for row in books.effects)
    return {
        "messages and public replies begun": len(books.effects),
        "requests to Instagram": len(books.postings),
        "accepted by Instagram": sum(posting.accepted for posting in books.postings),
        "marked `sent`": statuses["sent"],
        "marked `unknown`": statuses["unknown"],
        "marked `failed`": statuses["failed"],
        "left in `sending` by lost tasks and killed processes": statuses["sending"],
    }


def describe_round(stage: Stage, violations: list[Violation], seconds: float) -> str:
    """Return a line for a round, with the details if an invariant was violated."""
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
    """Return the tables of a run, with the command that repeats it."""
    faults = sum(totals.faults[kind] for kind in _ALL_KINDS)
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
            [(kind.replace("_", " "), totals.faults[kind]) for kind in _ALL_KINDS],
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
