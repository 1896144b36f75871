"""A counter's story: the journal's entries and the host's rows since the counter was last known. Pure data.

Times are seconds since 1970, so that thousands of rows are compared quickly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One change of the counter. A null counter counts as 0.

    `old`, `new`: a higher value is more tokens for the user. `counts_up`: the host's counter shows used tokens, and
    these are its negatives. `kind`: created, changed or deleted. `window`, `plan`: the period and the plans after it.
    `plan_tokens`: what the plans include; None: not looked up, because the plans stayed. `writer`: host, charge or
    correction.
    """

    id: int
    old: int
    new: int
    at: float
    kind: str = "changed"
    window: str = ""
    plan: str = ""
    plan_tokens: int | None = None
    transaction: int = 0
    application: str = ""
    writer: str = "host"
    counts_up: bool = False

    def written(self, value: int) -> int:
        """Return the value of the host's counter that this is."""
        return -value if self.counts_up else value

    @property
    def change(self) -> int:
        return self.new - self.old


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """A log row. `counts`: it is usage of this period. `own`: trueup lowers the counter for it."""

    id: str
    tokens: int
    at: float
    counts: bool = True
    own: bool = False
    section: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decrement:
    """A decrement row of the host's. `description`: what it says about the request; "": nothing."""

    id: str
    tokens: int
    at: float
    description: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payment:
    """A completed payment. `granted`: a grant covers it. `own_plan`: it bought the present plan again."""

    id: str
    tokens: int
    at: float
    own_plan: bool = False
    granted: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A grant that began or ended: what the counter should have changed by, and when."""

    id: str
    tokens: int
    at: float


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that happened to one counter, oldest first.

    `entries`: the first one may be the last of the time before, which only tells the period and the plan then: see
    `has_context`. `young_since`: the decrement of a later log row may still arrive. `ended_at`: when the subscription
    ended; None: it did not. `stops_at_zero`: the host does not lower the counter below zero.
    """

    entries: Sequence[Entry] = ()
    usage: Sequence[Usage] = ()
    decrements: Sequence[Decrement] = ()
    payments: Sequence[Payment] = ()
    payments_mapped: bool = False
    grants: Sequence[Grant] = ()
    plan_sizes: frozenset[int] = frozenset()
    young_since: float = float("inf")
    ended_at: float | None = None
    has_context: bool = False
    stops_at_zero: bool = True


def moment(at: float) -> str:
    """Return the time for people and JSON; the seconds since 1970 if it is outside of Python's range."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return str(at)


def shown(entry: Entry) -> dict[str, Any]:
    """Return an entry for the evidence of a report."""
    return {
        "entry_id": entry.id,
        "old": entry.written(entry.old),
        "new": entry.written(entry.new),
        "at": moment(entry.at),
        "application_name": entry.application,
    }


def in_chain_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries so that each begins with the value that the one before it ended with.

    A trigger of the host's that writes the counter again makes the entries of one transaction arrive out of order.
    """
    ordered: list[Entry] = []
    for group in _transactions(entries):
        left = list(group)
        value = ordered[-1].new if ordered else None
        while left:
            place = next((place for place, one in enumerate(left) if one.old == value), 0)
            if value is None and len(left) > 1:
                ends = [one.new for one in left]
                place = next((place for place, one in enumerate(left) if one.old not in ends), 0)
            ordered.append(left.pop(place))
            value = ordered[-1].new
    return ordered


def _transactions(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and (entry.transaction != group[0].transaction or not entry.transaction):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def holes(entries: Sequence[Entry]) -> bool:
    """Return whether a change between two entries went unseen."""
    return any(later.kind == "changed" and earlier.new != later.old for earlier, later in pairwise(entries))
