"""What rows in the log and rows of decrements say of a counter: two books of the same usage, row for row. Pure."""

from dataclasses import replace
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Certainty
from trueup.drift.evidence import BasePoint, Edge, EdgeRow, Evidence, Part, moment_of
from trueup.drift.hypotheses import (
    Candidate,
    Candidates,
    candidate,
    carried_of,
    credits_of,
    grants_of,
    less_certain,
    own_missed,
)
from trueup.drift.lost_updates import called_lost


def ledger_candidates(evidence: Evidence, plan_sizes: frozenset[int]) -> Candidates:
    """Return what rows in both books, purchases and grants may have done to the counter."""
    found = Candidates()
    found.proven += [_of_part(part) for part in evidence.parts]
    found.proven += own_missed(evidence)
    found.proven += called_lost(evidence)
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


def _shown(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a row as evidence shows it: from which book, its id, tokens and time."""
    if row["kind"] == "D":
        return {"decrement_id": row["id"], "tokens": tokens, "at": row["at"]}
    return {"log_id": row["id"], "tokens": tokens, "created_at": row["at"], "success": row["kind"] == "L"}


def _doubted(one: Candidate, paid: set[int]) -> Candidate:
    """A proven cause as large as a purchase may be that purchase, and the row's decrement one that left no row."""
    if one.tokens not in paid:
        return one
    return less_certain(replace(one, alternatives=(*one.alternatives, "credit_without_grant")))


def _of_part(part: Part) -> Candidate:
    rows = [_shown(row, sample["tokens"]) for sample in part.samples for row in sample["rows"]]
    proof: dict[str, Any] = {"count": part.count, "rows": rows[: weights.MAX_ROWS]}
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
    """Pair the rows of one size, in order of time: each side of the base point by itself, then across it."""
    kinds = {kind: [row for row in edge.rows if row.kind == kind] for kind in ("L", "F", "D")}
    logged, lowered = kinds["L"], kinds["D"]
    for settled in (True, False):
        sides = [[row for row in rows if row.settled == settled] for rows in (logged, lowered)]
        for log_row, decrement in zip(*sides, strict=False):
            logged.remove(log_row)
            lowered.remove(decrement)
    pairs = min(len(logged), len(lowered))
    for log_row, decrement in zip(logged, lowered, strict=False):
        found.possible.append(_straddling(edge, log_row, decrement))
    for row in logged[pairs:]:
        _add_single_log_row(found, edge, row, base)
    near = any(row.kind == "L" for row in edge.rows)
    for number, row in enumerate(lowered[pairs:]):
        _add_single_decrement(found, edge, row, base, near=near, failed=number < len(kinds["F"]))


def _straddling(edge: Edge, log_row: EdgeRow, decrement: EdgeRow) -> Candidate:
    proof = {"rows": [_shown(row.model_dump(), edge.tokens) for row in (log_row, decrement)]}
    if log_row.settled:
        note = "the decrement came after the counter was last known to be right, its log row before"
        return candidate(
            "double_decrement", -edge.tokens, "likely", at=decrement.at, alternatives=("charged_not_logged",),
            evidence={**proof, "note": note}, cost_used=weights.DECREMENT_AFTER_BASE,
        )  # fmt: skip
    note = "the decrement came before the counter was last known to be right, its log row after"
    return candidate(
        "missed_decrement",
        edge.tokens,
        "likely",
        at=log_row.at,
        evidence={**proof, "note": note},
        cost_used=weights.DECREMENT_BEFORE_BASE,
    )


def _add_single_log_row(found: Candidates, edge: Edge, row: EdgeRow, base: BasePoint) -> None:
    proof = {"count": 1, "rows": [_shown(row.model_dump(), edge.tokens)]}
    # The correction waited for a decrement of this size, which never came.
    waited_for = edge.tokens <= (base.kept or 0)
    if row.young:
        young = candidate(
            "missed_decrement",
            edge.tokens,
            "possible",
            at=row.at,
            evidence=proof,
            cost_unused=weights.YOUNG_LOG_ROW_UNUSED,
        )
        found.possible.append(replace(young, in_flight=True))
    elif not row.settled:
        found.proven.append(candidate("missed_decrement", edge.tokens, "certain", at=row.at, evidence=proof))
    elif base.kind == "run" or waited_for or _just_before(row, base):
        # Or it was committed after the counter was looked at, though it is dated before.
        cost = weights.AWAITED_LOG_ROW if waited_for else weights.LOG_ROW_BEFORE_BASE
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
        found.possible.append(
            less_certain(replace(one, cost_used=weights.YOUNG_DECREMENT, cost_unused=weights.YOUNG_DECREMENT))
        )
    elif not row.settled:
        found.proven.append(one)
    elif base.kind == "window" or _just_before(row, base):
        found.possible.append(less_certain(replace(one, cost_used=weights.LONE_DECREMENT_BEFORE_BASE)))


def _just_before(row: EdgeRow, base: BasePoint) -> bool:
    """Whether a settled row is so near that the look at the counter may have missed it: it is dated, then committed."""
    at, known_at = moment_of(row.at), base.moment
    return at is not None and known_at is not None and known_at - at <= weights.JUST_BEFORE


def _overwritten_correction(evidence: Evidence) -> Candidate | None:
    """A host that had read the counter before trueup corrected it may have written the old figure back.

    So may a person who disagreed, unless a request was at work at that moment.
    """
    base = evidence.base
    if base.kind != "correction" or base.written is None or base.seen_before in (None, base.written):
        return None
    tokens = (base.seen_before or 0) - base.written
    proof: dict[str, Any] = {"correction": base.model_dump()}
    others: tuple[str, ...] = ()
    if evidence.overwriting is not None:
        proof["overwritten_by"] = evidence.overwriting
        proof["note"] = "the host wrote back what it had read before the correction"
    else:
        proof["note"] = "the counter shows again what it did before the correction"
        others = ("manual_edit",)
    return candidate(
        "lost_update",
        tokens,
        "likely",
        at=base.at or "",
        alternatives=others,
        evidence=proof,
        cost_used=weights.OVERWRITTEN_CORRECTION,
    )
