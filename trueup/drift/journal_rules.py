"""The rules that explain an entry of the journal that is no plain decrement. Pure: pairing in, candidate out.

Each rule takes the pairing and the entry's place, and returns a candidate, or None if it does not fit. `RULES` has
their order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from trueup.drift.causes import Cause
from trueup.drift.findings import Found, decrement_row, log_row
from trueup.drift.pairing import AT_ONCE, Pairing
from trueup.drift.story import Entry, Grant, Payment, moment

# Seconds. A payment or a grant and the counter's change, in either order.
PAYMENT_HORIZON = 3_600.0

STALE = "the application wrote a value that it had read before the other changes"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One explanation of an entry, and the rows that belong to the entry then.

    `row`: the place of the log row that the entry subtracted. `payment`, `grant`: the ids of what the entry credited.
    `distance`: seconds between the entry and the log row that it names.
    """

    found: Found
    row: int | None = None
    payment: str | None = None
    grant: str | None = None
    distance: float = 0.0

    def take(self, pairing: Pairing, place: int) -> None:
        """Mark what belongs to the entry now."""
        if self.row is not None:
            pairing.pair(place, self.row)
        if self.payment is not None:
            pairing.paid.add(self.payment)
        if self.grant is not None:
            pairing.granted.add(self.grant)


def explain_entry(pairing: Pairing, place: int) -> Found | None:
    """Return the first explanation; inferred if another one has other tokens or another cause. None: it is no drift."""
    fitting = [one for rule in RULES if (one := rule(pairing, place))]
    if not fitting:
        return _edit(pairing, place)
    best = fitting[0].found
    fitting[0].take(pairing, place)
    others = dict.fromkeys(one.found.cause for one in fitting[1:] if one.found.cause != best.cause)
    if others or best.others:
        best = replace(best, certainty="inferred", others=(*best.others, *others))
    return best if best.tokens else None


def explain_charge(pairing: Pairing, place: int) -> Found | None:
    """Return why trueup lowered the counter for a charge of another size: it stopped at zero."""
    entry = pairing.entries[place]
    row = pairing.nearest_free(entry, lambda one: one.own and one.counts and one.tokens >= -entry.change)
    if row is None:
        return Found(
            cause="charged_not_logged", tokens=entry.change, at=entry.at, entries=(entry,), certainty="inferred",
            note="trueup lowered the counter for a call whose log row is missing",
        )  # fmt: skip
    candidate = _clamp(pairing, entry, row)
    candidate.take(pairing, place)
    return candidate.found if candidate.found.tokens else None


def _clamped(pairing: Pairing, place: int) -> Candidate | None:
    """The counter held less than the request cost, and stopped at zero."""
    entry = pairing.entries[place]
    # The host may have inserted a decrement row of what it subtracted, or none.
    if not pairing.is_emptied(entry) or pairing.amount(place) != -entry.change:
        return None
    if pairing.has_decrements and place not in pairing.meant:
        return None
    row = pairing.nearest_free(entry, lambda one: one.counts and not one.own and one.tokens > entry.old)
    return None if row is None else _clamp(pairing, entry, row)


def _clamp(pairing: Pairing, entry: Entry, row: int) -> Candidate:
    used = pairing.usage[row]
    found = Found(
        cause="clamped_at_zero", tokens=used.tokens - entry.old, at=entry.at, entries=(entry,), rows=(log_row(used),),
        note="the counter held less than this request cost",
    )  # fmt: skip
    return Candidate(found=found, row=row)


def _credited(pairing: Pairing, place: int) -> Candidate | None:
    """A purchase or a grant raised the counter."""
    entry, story = pairing.entries[place], pairing.story
    if entry.change <= 0:
        return None
    same = [one for one in story.payments if one.tokens == entry.change and _is_near(one.at, entry)]
    free = [one for one in same if one.id not in pairing.paid]
    grant = next((one for one in story.grants if _is_grant(pairing, one, entry)), None)
    if grant is not None:
        found = Found(cause="credit_without_grant", tokens=0, at=entry.at)
        return Candidate(found=found, grant=grant.id, payment=free[0].id if free else None)
    if free:
        paid = min(free, key=lambda one: abs(one.at - entry.at))
        cause: Cause = "renewal_without_new_window" if paid.own_plan else "credit_without_grant"
        found = Found(cause=cause, tokens=entry.change, at=entry.at, entries=(entry,), rows=(_payment_row(paid),))
        return Candidate(found=found, payment=paid.id)
    if same:
        rows = tuple(map(_payment_row, same))
        return Candidate(
            found=Found(cause="credited_twice", tokens=entry.change, at=entry.at, entries=(entry,), rows=rows)
        )
    if entry.change in story.plan_sizes and not story.payments_mapped:
        found = Found(
            cause="credit_without_grant", tokens=entry.change, at=entry.at, certainty="inferred", entries=(entry,),
            others=("renewal_without_new_window", "manual_edit"), more={"plans_of_this_size": True},
        )  # fmt: skip
        return Candidate(found=found)
    return None


def _payment_row(payment: Payment) -> dict[str, Any]:
    return {"payment_id": payment.id, "tokens": payment.tokens, "at": moment(payment.at)}


def _is_near(at: float, entry: Entry) -> bool:
    return abs(at - entry.at) <= PAYMENT_HORIZON


def _is_grant(pairing: Pairing, grant: Grant, entry: Entry) -> bool:
    return grant.id not in pairing.granted and grant.tokens == entry.change and _is_near(grant.at, entry)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """An entry as a write of an object read earlier: its value then, less the tokens of `row` (None: nothing)."""

    value: int
    row: int | None
    overwritten: tuple[Entry, ...]


def _stale(pairing: Pairing, place: int) -> Candidate | None:
    """The application saved a subscription that it had read earlier: all changes since are overwritten."""
    entry = pairing.entries[place]
    if place in pairing.meant:
        return None

    def doubt(reading: _Reading) -> float:
        # The nearer the log row, the likelier; a reading without a row fits seldom by chance.
        return AT_ONCE if reading.row is None else abs(pairing.usage[reading.row].at - entry.at)

    readings = sorted(_readings(pairing, place), key=doubt)
    if not readings:
        return None
    best = readings[0]
    row = None if best.row is None else pairing.usage[best.row]
    if row is None and entry.application not in pairing.usual:
        return None  # a person put the earlier value back
    others = ("stale_write",) if len({one.value for one in readings}) > 1 else ()
    found = Found(
        cause="stale_write", tokens=best.value - entry.old, at=entry.at, others=others,
        certainty="inferred" if others else "proven", entries=(entry, *best.overwritten),
        rows=(log_row(row),) if row else (), note=STALE, section=row.section if row else "",
        more={"read_value": entry.written(best.value)},
    )  # fmt: skip
    return Candidate(found=found, row=best.row)


def _readings(pairing: Pairing, place: int) -> Iterator[_Reading]:
    """Yield the readings that explain the new value: what the counter was, less a row without an entry."""
    entry = pairing.entries[place]
    held = pairing.held_before(place)
    if not held:
        return
    if entry.new in held:
        yield _Reading(value=entry.new, row=None, overwritten=tuple(pairing.entries[held[entry.new] : place]))
    for row in () if pairing.has_decrements else pairing.rows_near(entry):
        used = pairing.usage[row]
        read = entry.new + used.tokens
        if used.counts and not used.own and row not in pairing.entry_of and read in held:
            yield _Reading(value=read, row=row, overwritten=tuple(pairing.entries[held[read] : place]))


def _charged_wrongly(pairing: Pairing, place: int) -> Candidate | None:
    """A request that failed, or that trueup or the host has subtracted before: the nearest log row of its size."""
    if pairing.entries[place].change >= 0 or (pairing.has_decrements and place not in pairing.meant):
        return None  # the host would have inserted a decrement row
    fitting = [one for rule in (_failed, _own_charge_again, _double) if (one := rule(pairing, place))]
    return min(fitting, key=lambda one: one.distance, default=None)


def _subtracted(pairing: Pairing, place: int, row: int, cause: Cause, **more: Any) -> Found:
    """Return that the entry subtracted the row's tokens without a right."""
    entry = pairing.entries[place]
    return Found(
        cause=cause, tokens=_without_right(pairing, place), at=entry.at, rows=(log_row(pairing.usage[row]),),
        **({"entries": (entry,)} | more),
    )  # fmt: skip


def _without_right(pairing: Pairing, place: int) -> int:
    """Return the tokens that the entry subtracted without a right."""
    return pairing.entries[place].change if pairing.is_partial(place) else -pairing.amount(place)


def _distance(pairing: Pairing, place: int, row: int) -> float:
    return abs(pairing.usage[row].at - pairing.entries[place].at)


def _failed(pairing: Pairing, place: int) -> Candidate | None:
    row = pairing.nearest_free(pairing.entries[place], lambda one: not one.counts and pairing.fits(one, place))
    if row is None:
        return None
    found = _subtracted(pairing, place, row, "failed_usage_charged")
    return Candidate(found=found, row=row, distance=_distance(pairing, place, row))


def _own_charge_again(pairing: Pairing, place: int) -> Candidate | None:
    row = pairing.subtracted_before(place, own=True)
    if row is None:
        return None
    note = "trueup had lowered the counter for this call already"
    found = _subtracted(pairing, place, row, "host_decremented_our_charge", note=note)
    return Candidate(found=found, distance=_distance(pairing, place, row))


def _double(pairing: Pairing, place: int) -> Candidate | None:
    """A log row that was subtracted already; the second time maybe in part, because the counter reached zero."""
    row = pairing.subtracted_before(place, own=False)
    if row is None:
        return None
    entries = (pairing.entries[place], pairing.entries[pairing.entry_of[row]])
    found = _subtracted(pairing, place, row, "double_decrement", entries=entries)
    if pairing.usage[row].tokens != pairing.amount(place):
        found = replace(found, certainty="inferred", others=("manual_edit",))
    return Candidate(found=found, distance=_distance(pairing, place, row))


def _late(pairing: Pairing, place: int) -> Candidate | None:
    """A decrement that came late, or early."""
    entry, tokens = pairing.entries[place], pairing.amount(place)
    row = pairing.nearest_free(entry, lambda one: one.counts and not one.own and one.tokens == tokens)
    return None if row is None else Candidate(found=Found(cause="missed_decrement", tokens=0, at=entry.at), row=row)


def _unlogged(pairing: Pairing, place: int) -> Candidate | None:
    """A decrement row says what the entry meant, and no log row has that size."""
    entry = pairing.entries[place]
    if place not in pairing.meant:
        return None
    found = Found(
        cause="charged_not_logged", tokens=_without_right(pairing, place), at=entry.at, entries=(entry,),
        rows=(decrement_row(pairing.meant[place]),),
    )  # fmt: skip
    return Candidate(found=found)


def _edit(pairing: Pairing, place: int) -> Found:
    """No row explains the entry. From an application that never lowers counters for requests, it is an edit."""
    entry, story = pairing.entries[place], pairing.story
    if pairing.is_emptied(entry) and story.ended_at is not None and entry.at >= story.ended_at:
        return Found(cause="burned_at_expiry", tokens=entry.change, at=entry.at, entries=(entry,))
    return Found(
        cause="manual_edit", tokens=entry.change, at=entry.at, entries=(entry,),
        certainty="inferred" if entry.application in pairing.usual else "proven",
        note="no log row, decrement or payment explains this change",
        more={"plans_of_this_size": True} if entry.change in story.plan_sizes else {},
    )  # fmt: skip


RULES: tuple[Callable[[Pairing, int], Candidate | None], ...] = (
    _clamped,
    _credited,
    _stale,
    _charged_wrongly,
    _late,
    _unlogged,
)
"""The rules, the strongest first."""
