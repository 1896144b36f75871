"""Explain a drift by rows: match log rows with decrement rows; a row without a match is a cause. Pure."""

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
    """Return the causes that log rows, decrements, purchases and grants prove or allow."""
    found = Candidates()
    found.unmatched += [_of_part(part) for part in evidence.parts]
    found.unmatched += own_missed(evidence)
    found.unmatched += called_lost(evidence)
    for edge in evidence.edges:
        _add_edge(found, edge, evidence.base)
    found.possible += credits_of(evidence) + grants_of(evidence)
    found.carried += carried_of(evidence, plan_sizes)
    overwritten = _overwritten_correction(evidence)
    if overwritten:
        found.possible.append(overwritten)
    paid = {purchase.tokens for purchase in evidence.purchases if not purchase.granted}
    found.unmatched = [_doubted(one, paid) for one in found.unmatched]
    return found


_CAUSES: dict[str, Cause] = {
    "missed": "missed_decrement",
    "double": "double_decrement",
    "failed": "failed_usage_charged",
    "unlogged": "charged_not_logged",
}


def _shown(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a row for the evidence of a report."""
    if row["kind"] == "D":
        return {"decrement_id": row["id"], "tokens": tokens, "at": row["at"]}
    return {"log_id": row["id"], "tokens": tokens, "created_at": row["at"], "success": row["kind"] == "L"}


def _doubted(one: Candidate, paid: set[int]) -> Candidate:
    """Lower the certainty of a proven cause that has a purchase's size: the purchase may be the cause instead."""
    if one.tokens not in paid:
        return one
    return less_certain(replace(one, alternatives=(*one.alternatives, "credit_without_grant")))


def _of_part(part: Part) -> Candidate:
    rows = [_shown(row, sample["tokens"]) for sample in part.samples for row in sample["rows"]]
    proof: dict[str, Any] = {"count": part.count, "rows": rows[: weights.MAX_ROWS]}
    if part.late:
        proof["note"] = "other rows of this size were subtracted late, so it is not certain which row has no match"
    cause: Cause = _CAUSES[part.kind] if part.kind != "mixed" else _of_mixed(part)
    alternatives: tuple[str, ...] = ()
    if part.kind == "mixed":
        alternatives = tuple(sorted({"failed_usage_charged", "double_decrement", "charged_not_logged"} - {cause}))
    elif part.kind == "double":
        # A retry, or a call of the same size whose log row was lost: the rows look the same.
        alternatives = ("charged_not_logged",)
    elif part.kind != "missed" and part.elsewhere:
        # The decrement of a retry hours later is far from its log row.
        alternatives = ("double_decrement",)
    certainty: Certainty = "possible" if alternatives or part.late else "inferred"
    return candidate(cause, part.tokens, certainty, at=part.first_at, alternatives=alternatives, evidence=proof)


def _of_mixed(part: Part) -> Cause:
    """Return the cause of surplus decrements among failed and counted rows of one size.

    A decrement belongs to the log row just before it.
    """
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
    """Match the rows of one size in order of time: first on each side of the base point, then across it."""
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
    proof: dict[str, Any] = {"rows": [_shown(row.model_dump(), edge.tokens) for row in (log_row, decrement)]}
    if log_row.settled:
        note = "the log row is older than the time when the counter was last known to be right, its decrement newer"
        return candidate(
            "double_decrement", -edge.tokens, "possible", at=decrement.at, alternatives=("charged_not_logged",),
            evidence={**proof, "note": note}, cost_used=weights.DECREMENT_AFTER_BASE,
        )  # fmt: skip
    note = "the decrement is older than the time when the counter was last known to be right, its log row newer"
    proof |= {"note": note}
    cost = weights.DECREMENT_BEFORE_BASE
    return candidate("missed_decrement", edge.tokens, "possible", at=log_row.at, evidence=proof, cost_used=cost)


def _add_single_log_row(found: Candidates, edge: Edge, row: EdgeRow, base: BasePoint) -> None:
    proof = {"count": 1, "rows": [_shown(row.model_dump(), edge.tokens)]}
    # The last correction left tokens for a decrement of this size, which never came.
    waited_for = edge.tokens <= (base.kept or 0)
    if row.young:
        cost = weights.YOUNG_LOG_ROW_UNUSED
        young = candidate("missed_decrement", edge.tokens, "possible", at=row.at, evidence=proof, cost_unused=cost)
        found.possible.append(replace(young, in_flight=True))
    elif not row.settled:
        found.unmatched.append(candidate("missed_decrement", edge.tokens, "inferred", at=row.at, evidence=proof))
    elif base.kind == "run" or waited_for or _just_before(row, base):
        # Or the row was committed after the comparison, although its time is before it.
        cost = weights.AWAITED_LOG_ROW if waited_for else weights.LOG_ROW_BEFORE_BASE
        late = candidate("missed_decrement", edge.tokens, "possible", at=row.at, evidence=proof, cost_used=cost)
        found.possible.append(late)


def _add_single_decrement(
    found: Candidates, edge: Edge, row: EdgeRow, base: BasePoint, *, near: bool, failed: bool
) -> None:
    proof = {"count": 1, "rows": [_shown(row.model_dump(), edge.tokens)]}
    cause: Cause = "failed_usage_charged" if failed else "double_decrement" if near else "charged_not_logged"
    others = ("double_decrement", "charged_not_logged") if near else ()
    certainty: Certainty = "possible" if others else "inferred"
    one = candidate(
        cause, -edge.tokens, certainty, at=row.at, alternatives=tuple({*others} - {cause}), evidence=proof
    )  # fmt: skip
    if row.young:
        found.possible.append(
            less_certain(replace(one, cost_used=weights.YOUNG_DECREMENT, cost_unused=weights.YOUNG_DECREMENT))
        )
    elif not row.settled:
        found.unmatched.append(one)
    elif base.kind == "window" or _just_before(row, base):
        found.possible.append(less_certain(replace(one, cost_used=weights.LONE_DECREMENT_BEFORE_BASE)))


def _just_before(row: EdgeRow, base: BasePoint) -> bool:
    """Return whether the comparison may have missed a settled row: a row gets its time before its commit."""
    at, known_at = moment_of(row.at), base.moment
    return at is not None and known_at is not None and known_at - at <= weights.JUST_BEFORE


def _overwritten_correction(evidence: Evidence) -> Candidate | None:
    """Return the lost update of a host that read the counter before the last correction and wrote it after.

    Without a request at that moment, a person may have restored the old value.
    """
    base = evidence.base
    if base.kind != "correction" or base.written is None or base.seen_before in (None, base.written):
        return None
    tokens = (base.seen_before or 0) - base.written
    proof: dict[str, Any] = {"correction": base.model_dump()}
    others: tuple[str, ...] = ()
    if evidence.overwriting is not None:
        proof["overwritten_by"] = evidence.overwriting
        proof["note"] = "the host wrote the value that it had read before the correction"
    else:
        proof["note"] = "the counter has the same value as before the correction"
        others = ("manual_edit",)
    cost = weights.OVERWRITTEN_CORRECTION
    at = base.at or ""
    return candidate("lost_update", tokens, "possible", at=at, alternatives=others, evidence=proof, cost_used=cost)
