"""Replay the counter, decrement by decrement, to find where a host that stops at zero subtracted less. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trueup.drift import weights
from trueup.drift.causes import Certainty
from trueup.drift.evidence import Evidence, Row, Segment, moment_of
from trueup.drift.hypotheses import Candidate, candidate

_FROM_THE_START = ("carried_over_tokens", "grant_not_in_counter")


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """The tokens that a counter did not lose because it stopped at zero. `candidate` None: it did not stop.

    `cost`: how improbable this is. `cost_before_edit`: the extra cost if the explanation includes a manual edit.
    """

    candidate: Candidate | None = None
    cost: float = 0.0
    cost_before_edit: float = 0.0


def clamps(evidence: Evidence, chosen: Sequence[Candidate]) -> Iterator[Clamp]:
    """Replay the counter: yield the clamp at zero, if any, and the case that the host does not stop at zero."""
    credited = {place for place, purchase in enumerate(evidence.purchases) if purchase.granted}
    credited |= {one.purchase for one in chosen if one.purchase is not None and one.tokens > 0}
    credited -= {one.purchase for one in chosen if one.purchase is not None and one.tokens < 0}
    segments = {segment.number: segment for segment in evidence.segments}
    # Tokens that the counter had from the start and the figures lack, or the reverse.
    started = [one for one in chosen if one.component.cause in _FROM_THE_START and one.purchase is None]
    height = evidence.start + sum(one.tokens for one in started)
    stopped, below_zero, last = 0, [], False
    for number in range(max(segments, default=-1) + 1):
        if number - 1 in credited:
            height += evidence.purchases[number - 1].tokens
            last = False
        segment = segments.get(number)
        if segment is None:
            continue
        below = max(0, -(height + min(segment.lowest, 0)))
        if below:
            below_zero += _rows_below_zero(segment, height)
            last = True
        stopped += below
        height += segment.change + below
    if not stopped:
        yield Clamp()
        return
    cost = _cost_below_zero(below_zero)
    proof = {
        "rows": below_zero[: weights.MAX_ROWS_BELOW_ZERO],
        "count": len(below_zero),
        "note": "the counter held less than these decrements",
    }
    # If the carried-over tokens are unknown, they may hide in a clamp.
    unknown = any(carried.tokens is None for carried in evidence.carried) or not evidence.purchases_mapped
    kept = evidence.base.kind == "window" and unknown and not _names_carried(chosen)
    certainty: Certainty = "possible" if kept or cost >= weights.REQUEST_LET_THROUGH else "inferred"
    at = below_zero[0]["at"] if below_zero else ""
    others = ("carried_over_tokens",) if kept else ()
    found = candidate("clamped_at_zero", stopped, certainty, at=at, alternatives=others, evidence=proof)
    # A manual edit before these rows would explain by itself why the counter is above zero after them.
    yield Clamp(candidate=found, cost=cost, cost_before_edit=weights.EDIT_AFTER_CLAMP if last else 0.0)
    yield Clamp(cost=weights.NO_CLAMP)


def _names_carried(chosen: Sequence[Candidate]) -> bool:
    return any(one.component.cause == "carried_over_tokens" for one in chosen)


def _cost_below_zero(rows: Sequence[Row]) -> float:
    """Return the cost of believing that a host let these requests pass, after the first, with a counter at zero."""
    if not rows:
        return 0.0
    first = moment_of(rows[0]["at"])
    near = sum(first is not None and (moment_of(row["at"]) or first) <= first + weights.ON_ITS_WAY for row in rows[1:])
    later = len(rows) - 1 - near
    return min(near * weights.REQUEST_ON_ITS_WAY + later * weights.REQUEST_LET_THROUGH, weights.MAX_BELOW_ZERO)


def _rows_below_zero(segment: Segment, height: int) -> list[Row]:
    """Return the last decrements of a segment that exceeded the counter, oldest first."""
    height += segment.change
    found: list[Row] = []
    for row in segment.newest:
        if height >= 0:
            break
        found.append(row)
        height += int(row["tokens"])
    return found[::-1]
