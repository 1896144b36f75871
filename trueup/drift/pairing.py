"""Pair the journal's entries with the log rows and the decrement rows of the host. Pure.

A pair is an entry that subtracted a log row. An entry of a row's size belongs to it; of all pairs, the nearest in time
come first. The rules (`trueup.drift.journal_rules`) pair further entries.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable

from trueup.drift.story import Decrement, Entry, Story, Usage

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


class Pairing:
    """Which entry belongs to which rows. Entries and log rows are named by their places in `entries` and `usage`.

    `entry_of`: a log row's entry; `row_of`: an entry's log row. `meant`: the decrement row that says what an entry
    meant to subtract, even if it wrote another value. `lost`: the decrement rows beside no change of the counter.
    `has_decrements`: the host inserts such a row with each decrement. `usual`: the applications that lower counters.
    `paid`, `granted`: the payments and grants that have an entry, by id.
    """

    def __init__(self, story: Story, entries: list[Entry]) -> None:
        self.story = story
        self.entries = entries
        self.first = 1 if story.has_context else 0
        self.usage = sorted(story.usage, key=lambda row: row.at)
        self.usual = {entry.application for entry in entries if entry.writer == "host" and entry.change < 0}
        self.entry_of: dict[int, int] = {}
        self.row_of: dict[int, int] = {}
        self.paid: set[str] = set()
        self.granted: set[str] = set()
        self.meant: dict[int, Decrement] = {}
        self.lost: list[Decrement] = []
        self._times = [entry.at for entry in entries]
        self._row_times = [row.at for row in self.usage]
        self._read_decrements()
        self._pair_by_amount()

    def _read_decrements(self) -> None:
        left = sorted(self.story.decrements, key=lambda row: row.at)
        times, taken = [row.at for row in left], set[int]()
        fits: list[tuple[int, float, int, int]] = []
        for place in range(self.first, len(self.entries)):
            entry = self.entries[place]
            if entry.writer != "host" or entry.kind != "changed" or self.is_new_period(place):
                continue
            held: dict[int, int] | None = None
            for row in range(bisect_left(times, entry.at - BESIDE), bisect_right(times, entry.at + BESIDE)):
                tokens, distance = left[row].tokens, abs(times[row] - entry.at)
                if tokens == -entry.change:
                    fits.append((0, distance, place, row))
                elif self.is_emptied(entry) and tokens > entry.old:
                    fits.append((2, distance, place, row))
                else:
                    held = self.held_before(place) if held is None else held
                    if entry.new + tokens in held:
                        fits.append((1, distance, place, row))
        for _, _, place, row in sorted(fits):
            if place not in self.meant and row not in taken:
                taken.add(row)
                self.meant[place] = left[row]
        self.lost = [row for place, row in enumerate(left) if place not in taken]
        lowered = sum(entry.change < 0 and entry.writer == "host" for entry in self.entries)
        self.has_decrements = 2 * len(self.meant) >= lowered and bool(self.meant)

    def _pair_by_amount(self) -> None:
        by_amount: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for number, used in enumerate(self.usage):
            if used.counts:
                by_amount[used.tokens, used.own].append(number)
        pairs = []
        for place in range(self.first, len(self.entries)):
            entry = self.entries[place]
            if self.amount(place) <= 0 or entry.writer == "correction" or self.is_new_period(place):
                continue
            for row in by_amount.get((self.amount(place), entry.writer == "charge"), ()):
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
                self.pair(place, row)

    def pair(self, place: int, row: int) -> None:
        self.row_of[place] = row
        self.entry_of[row] = place

    def take_lost(self, row: Usage) -> Decrement | None:
        """Take the decrement row that says that the host subtracted this log row although the counter stayed."""
        for lost in self.lost:
            if lost.tokens == row.tokens and abs(lost.at - row.at) <= USUAL:
                self.lost.remove(lost)
                return lost
        return None

    def amount(self, place: int) -> int:
        """Return what the entry meant to subtract."""
        return self.meant[place].tokens if place in self.meant else -self.entries[place].change

    def is_emptied(self, entry: Entry) -> bool:
        """Return whether the counter reached zero and would have stopped there."""
        return entry.new == 0 and self.story.stops_at_zero

    def is_partial(self, place: int) -> bool:
        """Return whether the entry subtracted, without a right, all that the counter had: less than it meant to."""
        entry = self.entries[place]
        return place not in self.row_of and self.is_emptied(entry) and self.amount(place) > entry.old

    def is_new_period(self, place: int) -> bool:
        """Return whether the period or the plan changed with the entry."""
        if not place:
            return False
        entry, before = self.entries[place], self.entries[place - 1]
        return (entry.window, entry.plan) != (before.window, before.plan)

    def held_before(self, place: int) -> dict[int, int]:
        """Return the values that the counter had within the horizon before, each with the place of the next entry."""
        entry = self.entries[place]
        held: dict[int, int] = {}
        begin = place
        while begin > self.first and self.entries[begin - 1].at >= entry.at - HORIZON:
            begin -= 1
            held.setdefault(self.entries[begin].old, begin)
            if self.entries[begin].kind != "changed" or self.is_new_period(begin):
                break
        held.pop(entry.old, None)
        return held

    def value_at(self, at: float) -> int | None:
        """Return the counter at that time; None: the story has no entry, so it is not known."""
        if not self.entries:
            return None
        place = bisect_right(self._times, at)
        return self.entries[place - 1].new if place else self.entries[0].old

    def fits(self, row: Usage, place: int) -> bool:
        """Return whether the entry subtracts the row's tokens, or as many of them as the counter had."""
        if row.tokens == self.amount(place):
            return True
        entry = self.entries[place]
        return place not in self.meant and self.is_emptied(entry) and row.tokens > entry.old

    def rows_near(self, entry: Entry, horizon: float = HORIZON) -> range:
        """Return the log rows at most `horizon` seconds before or after the entry."""
        begin = bisect_left(self._row_times, entry.at - horizon)
        return range(begin, bisect_right(self._row_times, entry.at + horizon))

    def nearest_free(self, entry: Entry, is_fit: Callable[[Usage], bool]) -> int | None:
        """Return the nearest fitting log row without an entry."""
        return self._nearest(
            entry, (row for row in self.rows_near(entry) if is_fit(self.usage[row]) and row not in self.entry_of)
        )

    def subtracted_before(self, place: int, *, own: bool) -> int | None:
        """Return the nearest log row that an earlier entry has subtracted. `own`: for a charge of trueup's."""
        rows = (
            row
            for row in self.rows_near(self.entries[place], RETRY_HORIZON)
            if self.usage[row].counts
            and self.usage[row].own == own
            and self.entry_of.get(row, place) < place
            and self.fits(self.usage[row], place)
        )
        return self._nearest(self.entries[place], rows)

    def _nearest(self, entry: Entry, rows: Iterable[int]) -> int | None:
        return min(rows, key=lambda row: abs(self.usage[row].at - entry.at), default=None)
