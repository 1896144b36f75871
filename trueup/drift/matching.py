"""Match the journal's entries with the host's rows: what has no counterpart is a cause of drift. Pure.

The drift is the sum of the entries that no row explains and of the rows that have no entry, so nothing is searched by
sums. The finder yields findings in the order of the journal; `trueup.drift.history` puts them together.

1. `pairing`: an entry is a decrement of a log row of its size.
2. `journal_rules`: each other entry has the first explanation that fits. If several fit with different results, it is
   inferred, not proven.
3. A log row that no entry belongs to was not subtracted.
"""

from collections.abc import Iterator

from trueup.drift.causes import Cause
from trueup.drift.findings import BrokenChainError, Found, decrement_row, log_row
from trueup.drift.journal_rules import STALE, explain_charge, explain_entry
from trueup.drift.pairing import Pairing
from trueup.drift.story import Entry, Story, Usage, holes, in_chain_order, moment

_UNCHANGED = "the application wrote the value that the counter had already, because it had read it before other changes"


def match(story: Story) -> list[Found]:
    """Return the causes of drift in a story, oldest first. Raises `BrokenChainError` if the journal has a hole."""
    return match_pairs(story)[0]


def match_pairs(story: Story) -> tuple[list[Found], list[tuple[Entry, Usage]]]:
    """Return the causes of drift as `match` does, and each entry with the log row that it subtracted."""
    entries = in_chain_order(story.entries)
    if holes(entries):
        raise BrokenChainError
    pairing = Pairing(story, entries)
    found = sorted(_find(pairing), key=lambda one: one.at)
    return found, [(entries[place], pairing.usage[row]) for place, row in pairing.row_of.items()]


def _find(pairing: Pairing) -> Iterator[Found]:
    for place in range(pairing.first, len(pairing.entries)):
        yield from _of_entry(pairing, place)
    for grant in pairing.story.grants:
        if grant.id not in pairing.granted:
            rows = ({"grant_id": grant.id, "tokens": grant.tokens, "at": moment(grant.at)},)
            yield Found(cause="grant_not_in_counter", tokens=-grant.tokens, at=grant.at, rows=rows)
    for place, row in enumerate(pairing.usage):
        if row.counts and place not in pairing.entry_of:
            yield _of_row(pairing, row)


def _of_entry(pairing: Pairing, place: int) -> Iterator[Found]:
    entry = pairing.entries[place]
    if pairing.amount(place) != -entry.change and not pairing.is_partial(place):
        yield _overwrote(pairing, place)
    if place in pairing.row_of:
        return
    found: Found | None = None
    if entry.kind != "changed" or pairing.is_new_period(place):
        found = _of_plan(pairing, place)
    elif entry.change and entry.writer == "charge":
        found = explain_charge(pairing, place)
    elif entry.change and entry.writer == "correction":
        note = "trueup set the counter after the drift was found"
        found = Found(
            cause="unexplained", tokens=entry.change, at=entry.at, certainty="inferred", entries=(entry,), note=note
        )
    elif entry.change:
        found = explain_entry(pairing, place)
    if found is not None:
        yield found


def _overwrote(pairing: Pairing, place: int) -> Found:
    """The entry's decrement row says what it meant to subtract, and the counter changed by another amount."""
    entry, meant = pairing.entries[place], pairing.meant[place]
    rows = (decrement_row(meant),)
    if pairing.is_emptied(entry) and meant.tokens > entry.old:
        # Another value that it may have read would share the same tokens between the two causes.
        others = ("stale_write",) if any(value < meant.tokens for value in pairing.held_before(place)) else ()
        return Found(
            cause="clamped_at_zero", tokens=meant.tokens - entry.old, at=entry.at, entries=(entry,), rows=rows,
            note="the counter held less than this decrement", others=others,
            certainty="inferred" if others else "proven",
        )  # fmt: skip
    read = entry.new + meant.tokens
    after = pairing.held_before(place)[read]
    return Found(
        cause="stale_write", tokens=read - entry.old, at=entry.at, rows=rows, note=STALE,
        entries=(entry, *pairing.entries[after:place]), more={"read_value": entry.written(read)},
        section=pairing.usage[pairing.row_of[place]].section if place in pairing.row_of else "",
        description=meant.description,
    )  # fmt: skip


def _of_plan(pairing: Pairing, place: int) -> Found | None:
    """A plan changed within a period: the counter should follow its size. (`history` splits at new periods.)"""
    entry, before = pairing.entries[place], pairing.entries[max(place - 1, 0)]
    if entry.kind != "changed" or entry.window != before.window:
        return None
    off = entry.change - ((entry.plan_tokens or 0) - (before.plan_tokens or 0))
    if not off:
        return None
    cause: Cause = "carried_over_tokens" if off > 0 else "grant_not_in_counter"
    note = "the plan changed, and the counter did not change by the difference of the plans"
    return Found(cause=cause, tokens=off, at=entry.at, entries=(entry,), note=note)


def _of_row(pairing: Pairing, row: Usage) -> Found:
    """A log row that no entry subtracted."""
    rows = (log_row(row),)
    # trueup's own charge lowers the counter at once, or not at all.
    if row.own:
        note = "trueup could not lower the counter: the application had it locked"
    elif row.at >= pairing.story.young_since:
        return Found(cause="missed_decrement", tokens=row.tokens, at=row.at, rows=rows, is_young=True)
    else:
        note = ""
    if pairing.story.stops_at_zero and pairing.value_at(row.at) == 0:
        zero = "the counter was at zero already"
        return Found(cause="clamped_at_zero", tokens=row.tokens, at=row.at, rows=rows, note=zero)
    lost = None if row.own else pairing.take_lost(row)
    if lost is not None:
        return Found(
            cause="stale_write", tokens=row.tokens, at=row.at, rows=(*rows, decrement_row(lost)), note=_UNCHANGED,
            section=row.section, description=lost.description,
        )  # fmt: skip
    return Found(cause="missed_decrement", tokens=row.tokens, at=row.at, rows=rows, note=note)
