"""What evidence may mean for a counter: causes that its rows prove, and causes that they allow. Pure.

With the host's decrement rows at hand, a row without its partner must have moved the counter. A purchase, what an
upgrade kept, rows at the base point or too young to tell only may have: whether they did, the sum decides.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from billing.causes import Cause, Certainty, Component
from billing.evidence import BasePoint, Carried, Edge, EdgeRow, Evidence, Grant, Part, Purchase

# Rows shown for one cause; there may be more, and `count` says how many.
MOST_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A component that may be part of an explanation, `at` a time (ISO), with other names that fit its rows as well.

    `cost_used`, `cost_unused`: how much it strains belief that it moved the counter, and that it did not; the
    explanation that costs least wins. `purchase`: its place among the purchases, in order of time: the counter was
    raised by it, or, with negative tokens, was not. `in_flight`: no cause, only a decrement that has not come yet.
    """

    component: Component
    at: str = ""
    alternatives: tuple[str, ...] = ()
    cost_used: float = 0.0
    cost_unused: float = 0.0
    purchase: int | None = None
    in_flight: bool = False

    @property
    def tokens(self) -> int:
        return self.component.tokens


@dataclass(kw_only=True)
class Candidates:
    """`proven`: the rows can't be there without them. `possible`: each may be part of it. `carried`: at most one is."""

    proven: list[Candidate] = field(default_factory=list)
    possible: list[Candidate] = field(default_factory=list)
    carried: list[Candidate] = field(default_factory=list)


def candidate(
    cause: Cause,
    tokens: int,
    certainty: Certainty,
    *,
    at: str = "",
    alternatives: tuple[str, ...] = (),
    evidence: dict[str, Any] | None = None,
    **more: Any,
) -> Candidate:
    part = Component(cause=cause, tokens=tokens, certainty=certainty, evidence=evidence or {})
    return Candidate(component=part, at=at, alternatives=alternatives, **more)


def ledger_candidates(evidence: Evidence, plan_sizes: frozenset[int]) -> Candidates:
    """Return what rows in both books, purchases and grants may have done to the counter."""
    found = Candidates()
    found.proven += [_of_part(part) for part in evidence.parts]
    found.proven += own_missed(evidence)
    for edge in evidence.edges:
        _add_edge(found, edge, evidence.base)
    found.possible += credits_of(evidence) + grants_of(evidence)
    found.carried += carried_of(evidence, plan_sizes)
    overwritten = _overwritten_correction(evidence)
    if overwritten:
        found.possible.append(overwritten)
    paid = {purchase.tokens for purchase in evidence.purchases if not purchase.granted}
    found.proven = [_doubted(one, paid) for one in found.proven]
    return found


def own_missed(evidence: Evidence) -> list[Candidate]:
    """Return trueup's own charges that could not lower the counter."""
    own = evidence.own_missed
    if own is None:
        return []
    proof = {"by": "trueup: the counter was locked", "count": own.count, "rows": own.rows}
    return [candidate("missed_decrement", own.tokens, "certain", at=own.rows[0]["at"], evidence=proof)]


def _shown(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a row as evidence shows it: from which book, its id, tokens and time."""
    if row["kind"] == "D":
        return {"decrement_id": row["id"], "tokens": tokens, "at": row["at"]}
    return {"log_id": row["id"], "tokens": tokens, "created_at": row["at"], "success": row["kind"] == "L"}


def _doubted(one: Candidate, paid: set[int]) -> Candidate:
    """A proven cause as large as a purchase may be that purchase, and the row's decrement one that left no row."""
    if one.tokens not in paid:
        return one
    return _less_certain(replace(one, alternatives=(*one.alternatives, "credit_without_grant")))


def _less_certain(one: Candidate) -> Candidate:
    certainty: Certainty = "likely" if one.component.certainty == "certain" else one.component.certainty
    return replace(one, component=replace(one.component, certainty=certainty))


def _of_part(part: Part) -> Candidate:
    rows = [_shown(row, sample["tokens"]) for sample in part.samples for row in sample["rows"]]
    proof: dict[str, Any] = {"count": part.count, "rows": rows[:MOST_ROWS]}
    if part.late:
        proof["note"] = "others of this size were subtracted late: which one is left over is not certain"
    cause: Cause
    alternatives: tuple[str, ...] = ()
    if part.kind == "missed":
        cause = "missed_decrement"
    elif part.kind == "double":
        # A retry, or another call of the same size whose log row was lost: the rows look the same.
        cause, alternatives = "double_decrement", ("charged_not_logged",)
    elif part.kind == "failed":
        cause, alternatives = "failed_usage_charged", ("double_decrement",) if part.elsewhere else ()
    elif part.kind == "unlogged":
        # A retry hours later is not near its log row either.
        cause, alternatives = "charged_not_logged", ("double_decrement",) if part.elsewhere else ()
    else:
        cause = _of_mixed(part)
        others = {"failed_usage_charged", "double_decrement", "charged_not_logged"} - {cause}
        alternatives = tuple(sorted(others))
    certainty: Certainty = "likely" if alternatives or part.late else "certain"
    return candidate(cause, part.tokens, certainty, at=part.first_at, alternatives=alternatives, evidence=proof)


def _of_mixed(part: Part) -> Cause:
    """Failed and counted rows of one size, and a decrement too many: each belongs to the row just before it."""
    failed = double = 0
    for sample in part.samples:
        unpaired: list[str] = []
        for row in sample["rows"]:
            if row["kind"] != "D":
                unpaired.append(row["kind"])
            elif not unpaired:
                double += 1
            elif unpaired.pop() == "F":
                failed += 1
    return "failed_usage_charged" if failed >= double else "double_decrement"


def _add_edge(found: Candidates, edge: Edge, base: BasePoint) -> None:
    """Pair the rows of one size in order of time, and judge each pair and each single by where it lies."""
    logged = [row for row in edge.rows if row.kind == "L"]
    failed = [row for row in edge.rows if row.kind == "F"]
    lowered = [row for row in edge.rows if row.kind == "D"]
    pairs = min(len(logged), len(lowered))
    for log_row, decrement in zip(logged, lowered, strict=False):
        if log_row.settled != decrement.settled:
            found.possible.append(_straddling(edge, log_row, decrement))
    for row in logged[pairs:]:
        _add_single_log_row(found, edge, row, base)
    for number, row in enumerate(lowered[pairs:]):
        _add_single_decrement(found, edge, row, base, near=bool(logged), failed=number < len(failed))


def _straddling(edge: Edge, log_row: EdgeRow, decrement: EdgeRow) -> Candidate:
    proof = {"rows": [_shown(row.model_dump(), edge.tokens) for row in (log_row, decrement)]}
    if log_row.settled:
        note = "the decrement came after the counter was last known to be right, its log row before"
        return candidate(
            "double_decrement", -edge.tokens, "likely", at=decrement.at, alternatives=("charged_not_logged",),
            evidence={**proof, "note": note}, cost_used=1.5,
        )  # fmt: skip
    note = "the decrement came before the counter was last known to be right, its log row after"
    return candidate(
        "missed_decrement", edge.tokens, "likely", at=log_row.at, evidence={**proof, "note": note}, cost_used=3.0
    )


def _add_single_log_row(found: Candidates, edge: Edge, row: EdgeRow, base: BasePoint) -> None:
    proof = {"count": 1, "rows": [_shown(row.model_dump(), edge.tokens)]}
    if row.young:
        young = candidate("missed_decrement", edge.tokens, "possible", at=row.at, evidence=proof, cost_unused=0.5)
        found.possible.append(replace(young, in_flight=True))
    elif not row.settled:
        found.proven.append(candidate("missed_decrement", edge.tokens, "certain", at=row.at, evidence=proof))
    elif base.kind == "run" or base.kept:
        # Committed after that run, though it is dated before; or the correction waited for a decrement that never came.
        cost = 0.5 if base.kept else 3.0
        late = candidate("missed_decrement", edge.tokens, "likely", at=row.at, evidence=proof, cost_used=cost)
        found.possible.append(late)


def _add_single_decrement(
    found: Candidates, edge: Edge, row: EdgeRow, base: BasePoint, *, near: bool, failed: bool
) -> None:
    proof = {"count": 1, "rows": [_shown(row.model_dump(), edge.tokens)]}
    cause: Cause = "failed_usage_charged" if failed else "double_decrement" if near else "charged_not_logged"
    others = ("double_decrement", "charged_not_logged") if near else ()
    certainty: Certainty = "likely" if others else "certain"
    one = candidate(
        cause, -edge.tokens, certainty, at=row.at, alternatives=tuple({*others} - {cause}), evidence=proof
    )  # fmt: skip
    if row.young:
        found.possible.append(_less_certain(replace(one, cost_used=0.2, cost_unused=0.2)))
    elif not row.settled:
        found.proven.append(one)
    elif base.kind == "window":
        found.possible.append(_less_certain(replace(one, cost_used=3.0)))


def credits_of(evidence: Evidence) -> list[Candidate]:
    """Return the purchases that may have raised the counter. A host that sells tokens adds them: that is no strain."""
    return [
        _credit(purchase, place, evidence.base.kind)
        for place, purchase in enumerate(evidence.purchases)
        if not purchase.granted and not purchase.opened_window
    ]


def _credit(purchase: Purchase, place: int, base_kind: str) -> Candidate:
    cause: Cause = "renewal_without_new_window" if purchase.own_plan else "credit_without_grant"
    return candidate(
        cause,
        purchase.tokens,
        "certain",
        at=purchase.at,
        evidence={"payments": [purchase.model_dump(include={"id", "reference", "tokens", "at", "kind"})]},
        # Shortly before the base point, it may have been in the counter then, or come a moment later.
        cost_used=1.0 if purchase.settled else 0.0,
        cost_unused=0.0 if purchase.settled else 1.0,
        purchase=place,
    )


def grants_of(evidence: Evidence) -> list[Candidate]:
    """Return the grants that the counter may not have followed, but for those that a purchase in sight stands for."""
    places = {purchase.id: place for place, purchase in enumerate(evidence.purchases) if purchase.kind == "grant"}
    return [
        _grant(grant, places.get(str(grant.id)))
        for grant in evidence.grants
        if grant.ended_since or not grant.given_since or str(grant.id) in places
    ]


def _grant(grant: Grant, place: int | None) -> Candidate:
    tokens = grant.tokens if grant.ended_since else -grant.tokens
    note = "ended, and the counter kept it" if grant.ended_since else "given, and the counter does not show it"
    return candidate(
        "grant_not_in_counter",
        tokens,
        "likely",
        at=grant.granted_at,
        evidence={"grants": [grant.model_dump()], "note": note},
        cost_used=1.0,
        purchase=place,
    )


def carried_of(evidence: Evidence, plan_sizes: frozenset[int]) -> list[Candidate]:
    """Return what an upgrade may have kept, each figure once: by the log or by the decrements, of each earlier plan.

    What had run out was not there to be kept. A plan that is bought while another one runs is an upgrade: what was left
    of that one is expected to be kept.
    """
    found: dict[int, Candidate] = {}
    for carried in evidence.carried:
        sizes = [carried.tokens] if carried.tokens is not None else sorted(plan_sizes)
        for size in sizes:
            for left in (size - carried.used, size - carried.lowered):
                if left > 0 and not carried.ran_out:
                    found.setdefault(left, _carried(carried, size, left))
    return list(found.values())[:24]


def _carried(carried: Carried, size: int, left: int) -> Candidate:
    guessed = carried.tokens is None
    proof: dict[str, Any] = {
        "upgrade": carried.upgrade,
        "before": {**carried.model_dump(exclude={"upgrade"}), "tokens": size},
    }
    if guessed:
        proof["note"] = "no earlier payment: the size of an earlier plan is taken from those on sale"
    return candidate(
        "carried_over_tokens",
        left,
        "likely" if guessed or carried.same_plan else "certain",
        # A plan that is renewed seldom keeps anything: a hand may have added just as much.
        alternatives=("manual_edit",) if carried.same_plan else (),
        at=carried.upgrade["at"],
        evidence=proof,
        cost_used=2.6 if guessed else (2.4 if carried.same_plan else 0.0) + 0.4 * (carried.place - 1),
        cost_unused=0.0 if guessed or carried.same_plan else 1.5,
    )


def _overwritten_correction(evidence: Evidence) -> Candidate | None:
    """A host that had read the counter before trueup corrected it may have written the old figure back."""
    base = evidence.base
    if base.kind != "correction" or base.written is None or base.seen_before in (None, base.written):
        return None
    tokens = (base.seen_before or 0) - base.written
    proof = {"correction": base.model_dump(), "note": "the host wrote back what it had read before the correction"}
    return candidate("lost_update", tokens, "likely", at=base.at or "", evidence=proof, cost_used=2.0)
