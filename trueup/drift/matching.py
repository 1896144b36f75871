"""Match the journal's entries with the host's rows: what has no counterpart is a cause of drift. Pure.

The drift is the sum of the entries that no row explains and of the rows that have no entry, so nothing is searched by
sums. The finder yields findings in the order of the journal; `components_of` puts them together.

1. An entry is a decrement of a log row of its size; of all pairs, the nearest in time match first.
2. The rules of `_Matcher._rules` try each other entry. If several rules fit with different results, the first one
   wins and is inferred, not proven.
3. A log row that no entry belongs to was not subtracted.
"""

# Longer than 500 lines: the rules share the state of one matching.

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trueup.drift.causes import Cause, Certainty
from trueup.drift.story import Entry, Story, Usage, holes, in_chain_order, moment

# Seconds. How long an application may keep a subscription that it has read before it saves it, and how far a log row
# may be from its decrement.
HORIZON = 600.0
# A decrement is at most so far from its log row, unless no other cause fits: more rows nearby match by chance.
USUAL = 30.0
# The host inserts a decrement row beside its write of the counter.
BESIDE = 2.0
# A retry subtracts a row again within this time.
RETRY_HORIZON = 60.0
# Of two readings, the one whose log row is so near wins over a whole object that was saved without a request.
AT_ONCE = 5.0
# A payment or a grant and the counter's change, in either order.
PAYMENT_HORIZON = 3_600.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """One cause of drift. `tokens` is positive if it made the counter too high.

    `at`: seconds since 1970. `entries`: the journal's entries that prove it; `rows`: the host's rows. `others`: causes
    that fit the entry too. `section`: of the request that made a stale write; "": not known. `is_young`: no cause yet,
    the decrement of this log row may still arrive.
    """

    cause: Cause
    tokens: int
    at: float
    certainty: Certainty = "proven"
    entries: tuple[Entry, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    others: tuple[str, ...] = ()
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    section: str = ""
    is_young: bool = False


class BrokenChainError(Exception):
    """A change of the counter went unseen, so the journal proves nothing about this time."""


def match(story: Story) -> list[Found]:
    """Return the causes of drift in a story, oldest first. Raises `BrokenChainError` if the journal has a hole."""
    return match_pairs(story)[0]


def match_pairs(story: Story) -> tuple[list[Found], list[tuple[Entry, Usage]]]:
    """Return the causes of drift as `match` does, and each entry with the log row that it subtracted."""
    entries = in_chain_order(story.entries)
    if holes(entries):
        raise BrokenChainError
    matcher = _Matcher(story, entries)
    found = sorted(matcher.find(), key=lambda one: one.at)
    return found, [(entries[place], matcher.usage[row]) for place, row in matcher.row_of.items()]


_UNCHANGED = "the application wrote the value that the counter had already, because it had read it before other changes"
_STALE = "the application wrote a value that it had read before the other changes"


@dataclass(frozen=True, kw_only=True)
class _Stale:
    """An entry as a write of an object read earlier: its value then, less the tokens of `row` (None: nothing)."""

    value: int
    row: int | None
    overwritten: tuple[Entry, ...]


class _Matcher:
    """The state of one matching: which rows have an entry already."""

    def __init__(self, story: Story, entries: list[Entry]) -> None:
        self.story = story
        self.entries = entries
        self.first = 1 if story.has_context else 0
        self.times = [entry.at for entry in entries]
        self.usage = sorted(story.usage, key=lambda row: row.at)
        self.row_times = [row.at for row in self.usage]
        self.entry_of: dict[int, int] = {}  # by the place of the row
        self.row_of: dict[int, int] = {}  # by the place of the entry
        self.paid: set[str] = set()
        self.granted: set[str] = set()
        self.amounts: dict[int, int] = {}  # by the place of the entry: what it meant to subtract, by a decrement row
        self.named: dict[int, str] = {}  # by the place of the entry: that decrement row
        self.without_entry: list[tuple[float, int, str]] = []  # decrement rows beside no change of the counter
        self.usual = {entry.application for entry in entries if entry.writer == "host" and entry.change < 0}

    def find(self) -> Iterator[Found]:
        self._read_decrements()
        self._pair_by_amount()
        for place in range(self.first, len(self.entries)):
            yield from self._of_entry(place)
        yield from self._of_grants()
        for place, row in enumerate(self.usage):
            if row.counts and place not in self.entry_of:
                yield self._of_row(row)

    def _read_decrements(self) -> None:
        """Find what each entry meant to subtract: the decrement row beside it says so, even if the write was stale."""
        left = sorted(self.story.decrements, key=lambda row: row[2])
        times, taken = [row[2] for row in left], set[int]()
        meant: list[tuple[int, float, int, int]] = []
        for place in range(self.first, len(self.entries)):
            entry = self.entries[place]
            if entry.writer != "host" or entry.kind != "changed" or self._is_new_period(place):
                continue
            held: dict[int, int] | None = None
            for row in range(bisect_left(times, entry.at - BESIDE), bisect_right(times, entry.at + BESIDE)):
                tokens, distance = left[row][1], abs(times[row] - entry.at)
                if tokens == -entry.change:
                    meant.append((0, distance, place, row))
                elif self._is_emptied(entry) and tokens > entry.old:
                    meant.append((2, distance, place, row))
                else:
                    held = self._held_before(place) if held is None else held
                    if entry.new + tokens in held:
                        meant.append((1, distance, place, row))
        for _, _, place, row in sorted(meant):
            if place not in self.amounts and row not in taken:
                taken.add(row)
                self.amounts[place], self.named[place] = left[row][1], left[row][0]
        self.without_entry = [(row[2], row[1], row[0]) for place, row in enumerate(left) if place not in taken]
        lowered = sum(entry.change < 0 and entry.writer == "host" for entry in self.entries)
        # A host that writes such rows writes one for each decrement.
        self.has_decrements = 2 * len(self.amounts) >= lowered and bool(self.amounts)

    def _is_emptied(self, entry: Entry) -> bool:
        """Return whether the counter reached zero and would have stopped there."""
        return entry.new == 0 and self.story.stops_at_zero

    def _amount(self, place: int) -> int:
        """Return what the entry meant to subtract."""
        return self.amounts.get(place, -self.entries[place].change)

    def _pair_by_amount(self) -> None:
        """Pair decrements with log rows of their size, the nearest in time first."""
        by_amount: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for number, used in enumerate(self.usage):
            if used.counts:
                by_amount[used.tokens, used.own].append(number)
        pairs = []
        for place in range(self.first, len(self.entries)):
            entry = self.entries[place]
            if self._amount(place) <= 0 or entry.writer == "correction" or self._is_new_period(place):
                continue
            for row in by_amount.get((self._amount(place), entry.writer == "charge"), ()):
                distance = abs(self.usage[row].at - entry.at)
                if distance <= USUAL:
                    pairs.append((distance, place, row))
        pairs.sort()
        # Most hosts log a request before they subtract it. Then a later log row belongs to another request.
        near = [self.usage[row].at <= self.entries[place].at for distance, place, row in pairs if distance <= AT_ONCE]
        logs_first = sum(near) >= 0.9 * len(near)
        for distance, place, row in pairs:
            is_later = self.usage[row].at > self.entries[place].at and logs_first and distance > AT_ONCE
            if place not in self.row_of and row not in self.entry_of and not is_later:
                self._pair(place, row)

    def _pair(self, place: int, row: int) -> None:
        self.row_of[place] = row
        self.entry_of[row] = place

    def _of_entry(self, place: int) -> Iterator[Found]:
        entry = self.entries[place]
        if place in self.amounts and self.amounts[place] != -entry.change and not self._is_partial(place):
            yield self._overwrote(place)
        if place in self.row_of:
            return
        if entry.kind != "changed" or self._is_new_period(place):
            yield from self._of_period(place)
        elif entry.change and entry.writer == "charge":
            yield from self._of_charge(place)
        elif entry.change and entry.writer == "correction":
            yield Found(
                cause="unexplained", tokens=entry.change, at=entry.at, certainty="inferred", entries=(entry,),
                note="trueup set the counter after the drift was found",
            )  # fmt: skip
        elif entry.change:
            found = [one for rule in self._rules() if (one := rule(place))]
            yield from self._best(place, found)

    def _overwrote(self, place: int) -> Found:
        """The entry's decrement row says what it meant to subtract, and the counter changed by another amount."""
        entry, tokens = self.entries[place], self.amounts[place]
        row: dict[str, Any] = {"decrement_id": self.named[place], "tokens": tokens}
        if self._is_emptied(entry) and tokens > entry.old:
            # Another value that it may have read would share the same tokens between the two causes.
            others = ("stale_write",) if any(value < tokens for value in self._held_before(place)) else ()
            return Found(
                cause="clamped_at_zero", tokens=tokens - entry.old, at=entry.at, entries=(entry,), rows=(row,),
                note="the counter held less than this decrement", others=others,
                certainty="inferred" if others else "proven",
            )  # fmt: skip
        read = entry.new + tokens
        after = self._held_before(place)[read]
        return Found(
            cause="stale_write", tokens=read - entry.old, at=entry.at, rows=(row,), note=_STALE,
            entries=(entry, *self.entries[after:place]), more={"read_value": entry.written(read)},
            section=self.usage[self.row_of[place]].section if place in self.row_of else "",
        )  # fmt: skip

    def _is_partial(self, place: int) -> bool:
        """Return whether the entry subtracted, without a right, all that the counter had: less than it meant to."""
        entry = self.entries[place]
        return place not in self.row_of and self._is_emptied(entry) and self._amount(place) > entry.old

    def _charged(self, place: int) -> int:
        """Return the tokens that the entry subtracted without a right."""
        return self.entries[place].change if self._is_partial(place) else -self._amount(place)

    def _rules(self) -> tuple[Callable[[int], Found | None], ...]:
        return (
            self._clamped,
            self._purchase,
            self._stale,
            self._charged_wrongly,
            self._late,
            self._unlogged,
        )

    def _best(self, place: int, found: list[Found]) -> Iterator[Found]:
        """Yield the first explanation; inferred if another one has other tokens or another cause."""
        if not found:
            yield self._edit(place)
            return
        best, others = found[0], tuple(dict.fromkeys(one.cause for one in found[1:] if one.cause != found[0].cause))
        self._take(place, best)
        if others or best.others:
            best = Found(**{**_fields(best), "certainty": "inferred", "others": (*best.others, *others)})
        if best.tokens:
            yield best

    def _take(self, place: int, found: Found) -> None:
        """Mark the log row that the chosen explanation uses."""
        found.more.pop("_from", None)
        row = found.more.pop("_row", None)
        if row is not None:
            self._pair(place, row)
        payment = found.more.pop("_payment", None)
        if payment is not None:
            self.paid.add(payment)

    # The rules. Each returns an explanation of the entry, or None.

    def _clamped(self, place: int) -> Found | None:
        """The counter held less than the request cost, and stopped at zero."""
        entry = self.entries[place]
        # The host may have inserted a decrement row of what it subtracted, or none.
        if not self._is_emptied(entry) or self.amounts.get(place, -entry.change) != -entry.change:
            return None
        if self.has_decrements and place not in self.amounts:
            return None
        row = self._nearest(entry, lambda one: one.counts and not one.own and one.tokens > entry.old)
        return row if row is None else self._clamp(entry, row)

    def _clamp(self, entry: Entry, row: int) -> Found:
        used = self.usage[row]
        return Found(
            cause="clamped_at_zero", tokens=used.tokens - entry.old, at=entry.at, entries=(entry,),
            rows=(_row(used),), note="the counter held less than this request cost", more={"_row": row},
        )  # fmt: skip

    def _purchase(self, place: int) -> Found | None:
        entry = self.entries[place]
        if entry.change <= 0:
            return None
        near = [one for one in self.story.payments if abs(one.at - entry.at) <= PAYMENT_HORIZON]
        same = [one for one in near if one.tokens == entry.change]
        free = [one for one in same if one.id not in self.paid]
        grant = next((one for one in self.story.grants if self._is_grant(one, entry)), None)
        if grant is not None:
            self.granted.add(grant.id)
            self.paid |= {one.id for one in free[:1]}
            return Found(cause="credit_without_grant", tokens=0, at=entry.at)
        if free:
            paid = min(free, key=lambda one: abs(one.at - entry.at))
            cause: Cause = "renewal_without_new_window" if paid.own_plan else "credit_without_grant"
            return Found(
                cause=cause, tokens=entry.change, at=entry.at, entries=(entry,),
                rows=({"payment_id": paid.id, "tokens": paid.tokens, "at": moment(paid.at)},),
                more={"_payment": paid.id},
            )  # fmt: skip
        if same:
            rows = tuple({"payment_id": one.id, "tokens": one.tokens, "at": moment(one.at)} for one in same)
            return Found(cause="credited_twice", tokens=entry.change, at=entry.at, entries=(entry,), rows=rows)
        if entry.change in self.story.plan_sizes and not self.story.payments_mapped:
            return Found(
                cause="credit_without_grant", tokens=entry.change, at=entry.at, certainty="inferred", entries=(entry,),
                others=("renewal_without_new_window", "manual_edit"), more={"plans_of_this_size": True},
            )  # fmt: skip
        return None

    def _charged_wrongly(self, place: int) -> Found | None:
        """A request that failed, or that trueup or the host has subtracted before: the nearest log row of its size."""
        if self.has_decrements and place not in self.amounts:
            return None  # the host would have inserted a decrement row
        found = [one for rule in (self._failed, self._own_charge_again, self._double) if (one := rule(place))]
        at = self.entries[place].at
        return min(found, key=lambda one: abs(self.usage[one.more["_from"]].at - at), default=None)

    def _failed(self, place: int) -> Found | None:
        entry = self.entries[place]
        if entry.change >= 0:
            return None
        row = self._nearest(entry, lambda one: not one.counts and self._fits(one, place))
        if row is None:
            return None
        rows = (_row(self.usage[row]),)
        return Found(
            cause="failed_usage_charged", tokens=self._charged(place), at=entry.at, entries=(entry,), rows=rows,
            more={"_row": row, "_from": row},
        )  # fmt: skip

    def _stale(self, place: int) -> Found | None:
        """The application saved a subscription that it had read earlier: all changes since are overwritten."""
        entry = self.entries[place]
        if place in self.amounts:
            return None
        found = sorted(self._stale_readings(place), key=lambda one: self._doubt_of(place, one))
        if not found:
            return None
        best = found[0]
        row = None if best.row is None else self.usage[best.row]
        others: tuple[str, ...] = ()
        if len({one.value for one in found}) > 1:
            others = ("stale_write",)
        if row is None and entry.application not in self.usual:
            return None  # a person put the earlier value back
        return Found(
            cause="stale_write", tokens=best.value - entry.old, at=entry.at, others=others,
            certainty="inferred" if others else "proven",
            entries=(entry, *best.overwritten), rows=(_row(row),) if row else (),
            note=_STALE, section=row.section if row else "",
            more={"read_value": entry.written(best.value), **({"_row": best.row} if row else {})},
        )  # fmt: skip

    def _stale_readings(self, place: int) -> Iterator[_Stale]:
        """Yield the readings that explain the new value: what the counter was, less a row without an entry."""
        entry = self.entries[place]
        held = self._held_before(place)
        if not held:
            return
        if entry.new in held:
            yield _Stale(value=entry.new, row=None, overwritten=tuple(self.entries[held[entry.new] : place]))
        for row in () if self.has_decrements else self._near(entry):
            used = self.usage[row]
            after = held.get(entry.new + used.tokens)
            if used.counts and not used.own and row not in self.entry_of and after is not None:
                read = entry.new + used.tokens
                yield _Stale(value=read, row=row, overwritten=tuple(self.entries[after:place]))

    def _held_before(self, place: int) -> dict[int, int]:
        """Return the values that the counter had within the horizon before, each with the place of the next entry."""
        entry = self.entries[place]
        held: dict[int, int] = {}
        begin = place
        while begin > self.first and self.entries[begin - 1].at >= entry.at - HORIZON:
            begin -= 1
            held.setdefault(self.entries[begin].old, begin)
            if self.entries[begin].kind != "changed" or self._is_new_period(begin):
                break
        held.pop(entry.old, None)
        return held

    def _doubt_of(self, place: int, stale: _Stale) -> float:
        """Order readings: the nearer the log row, the likelier; a reading without a row fits seldom by chance."""
        return AT_ONCE if stale.row is None else abs(self.usage[stale.row].at - self.entries[place].at)

    def _own_charge_again(self, place: int) -> Found | None:
        entry = self.entries[place]
        if entry.change >= 0:
            return None
        row = self._subtracted_before(place, own=True)
        if row is None:
            return None
        return Found(
            cause="host_decremented_our_charge", tokens=self._charged(place), at=entry.at, entries=(entry,),
            rows=(_row(self.usage[row]),), note="trueup had lowered the counter for this call already",
            more={"_from": row},
        )  # fmt: skip

    def _double(self, place: int) -> Found | None:
        """A log row that was subtracted already; the second time maybe in part, because the counter reached zero."""
        entry = self.entries[place]
        if entry.change >= 0:
            return None
        row = self._subtracted_before(place, own=False)
        if row is None:
            return None
        whole = self.usage[row].tokens == self._amount(place)
        return Found(
            cause="double_decrement", tokens=self._charged(place), at=entry.at, rows=(_row(self.usage[row]),),
            certainty="proven" if whole else "inferred", others=() if whole else ("manual_edit",),
            entries=(entry, self.entries[self.entry_of[row]]), more={"_from": row},
        )  # fmt: skip

    def _late(self, place: int) -> Found | None:
        """A decrement that came late, or early."""
        entry = self.entries[place]
        tokens = self._amount(place)
        row = self._nearest(entry, lambda one: one.counts and not one.own and one.tokens == tokens)
        return None if row is None else Found(cause="missed_decrement", tokens=0, at=entry.at, more={"_row": row})

    def _unlogged(self, place: int) -> Found | None:
        entry = self.entries[place]
        if place not in self.amounts:
            return None
        row = {"decrement_id": self.named[place], "tokens": self.amounts[place], "at": moment(entry.at)}
        return Found(
            cause="charged_not_logged", tokens=self._charged(place), at=entry.at, entries=(entry,), rows=(row,)
        )

    def _edit(self, place: int) -> Found:
        """No row explains the entry. From an application that never lowers counters for requests, it is an edit."""
        entry = self.entries[place]
        ended = self.story.ended_at
        if self._is_emptied(entry) and ended is not None and entry.at >= ended:
            return Found(cause="burned_at_expiry", tokens=entry.change, at=entry.at, entries=(entry,))
        is_usual = entry.application in self.usual
        note = "no log row, decrement or payment explains this change"
        more = {"plans_of_this_size": True} if entry.change in self.story.plan_sizes else {}
        return Found(
            cause="manual_edit", tokens=entry.change, at=entry.at, entries=(entry,), note=note, more=more,
            certainty="inferred" if is_usual else "proven",
        )  # fmt: skip

    def _of_charge(self, place: int) -> Iterator[Found]:
        """trueup lowered the counter for a charge of another size: it stopped at zero."""
        entry = self.entries[place]
        row = self._nearest(entry, lambda one: one.own and one.counts and one.tokens >= -entry.change)
        if row is not None:
            found = self._clamp(entry, row)
            self._take(place, found)
            if found.tokens:
                yield found
        else:
            yield Found(
                cause="charged_not_logged", tokens=entry.change, at=entry.at, entries=(entry,), certainty="inferred",
                note="trueup lowered the counter for a call whose log row is missing",
            )  # fmt: skip

    def _is_new_period(self, place: int) -> bool:
        if not place:
            return False
        entry, before = self.entries[place], self.entries[place - 1]
        return (entry.window, entry.plan) != (before.window, before.plan)

    def _of_period(self, place: int) -> Iterator[Found]:
        """A plan changed within a period: the counter should follow its size. (`history` splits at new periods.)"""
        entry, before = self.entries[place], self.entries[max(place - 1, 0)]
        if entry.kind != "changed" or entry.window != before.window:
            return
        planned = (entry.plan_tokens or 0) - (before.plan_tokens or 0)
        off = entry.change - planned
        if not off:
            return
        cause: Cause = "carried_over_tokens" if off > 0 else "grant_not_in_counter"
        yield Found(
            cause=cause, tokens=off, at=entry.at, entries=(entry,),
            note="the plan changed, and the counter did not change by the difference of the plans",
        )  # fmt: skip

    def _of_grants(self) -> Iterator[Found]:
        for grant in self.story.grants:
            if grant.id not in self.granted and not self._follows(grant):
                rows = ({"grant_id": grant.id, "tokens": grant.tokens, "at": moment(grant.at)},)
                yield Found(cause="grant_not_in_counter", tokens=-grant.tokens, at=grant.at, rows=rows)

    def _follows(self, grant: Any) -> bool:
        """Return whether an entry that no rule explained follows a grant that ended."""
        return False

    def _is_grant(self, grant: Any, entry: Entry) -> bool:
        return (
            grant.id not in self.granted
            and grant.tokens == entry.change
            and abs(grant.at - entry.at) <= PAYMENT_HORIZON
        )

    def _of_row(self, row: Usage) -> Found:
        # trueup's own charge lowers the counter at once, or not at all.
        if row.at >= self.story.young_since and not row.own:
            return Found(cause="missed_decrement", tokens=row.tokens, at=row.at, rows=(_row(row),), is_young=True)
        if self.story.stops_at_zero and self._value_at(row.at) == 0:
            note = "the counter was at zero already"
            return Found(cause="clamped_at_zero", tokens=row.tokens, at=row.at, rows=(_row(row),), note=note)
        for place, (at, tokens, name) in enumerate(self.without_entry):
            if tokens == row.tokens and abs(at - row.at) <= USUAL and not row.own:
                del self.without_entry[place]
                lost = {"decrement_id": name, "tokens": tokens, "at": moment(at)}
                return Found(
                    cause="stale_write", tokens=tokens, at=row.at, rows=(_row(row), lost), note=_UNCHANGED,
                    section=row.section,
                )  # fmt: skip
        note = "trueup could not lower the counter: the application had it locked" if row.own else ""
        return Found(cause="missed_decrement", tokens=row.tokens, at=row.at, rows=(_row(row),), note=note)

    def _value_at(self, at: float) -> int | None:
        """Return the counter at that time; None: the story has no entry, so it is not known."""
        if not self.entries:
            return None
        place = bisect_right(self.times, at)
        return self.entries[place - 1].new if place else self.entries[0].old

    def _fits(self, row: Usage, place: int) -> bool:
        """Return whether the entry subtracts the row's tokens, or as many of them as the counter had."""
        if row.tokens == self._amount(place):
            return True
        entry = self.entries[place]
        return place not in self.amounts and self._is_emptied(entry) and row.tokens > entry.old

    def _near(self, entry: Entry) -> range:
        begin = bisect_left(self.row_times, entry.at - HORIZON)
        return range(begin, bisect_right(self.row_times, entry.at + HORIZON))

    def _nearest(self, entry: Entry, is_fit: Callable[[Usage], bool]) -> int | None:
        """Return the nearest fitting log row without an entry."""
        rows = [row for row in self._near(entry) if is_fit(self.usage[row]) and row not in self.entry_of]
        return min(rows, key=lambda row: abs(self.usage[row].at - entry.at), default=None)

    def _subtracted_before(self, place: int, *, own: bool) -> int | None:
        """Return the nearest log row that an earlier entry has subtracted. `own`: for a charge of trueup's."""
        entry = self.entries[place]
        begin = bisect_left(self.row_times, entry.at - RETRY_HORIZON)
        rows = [
            row
            for row in range(begin, bisect_right(self.row_times, entry.at + RETRY_HORIZON))
            if self.usage[row].counts
            and self.usage[row].own == own
            and self.entry_of.get(row, place) < place
            and self._fits(self.usage[row], place)
        ]
        return min(rows, key=lambda row: abs(self.usage[row].at - entry.at), default=None)


def _row(row: Usage) -> dict[str, Any]:
    return {"log_id": row.id, "tokens": row.tokens, "created_at": moment(row.at), "success": row.counts}


def _fields(found: Found) -> dict[str, Any]:
    return {name: getattr(found, name) for name in found.__dataclass_fields__}
