"""What the matching finds in a counter's story. Pure data."""

from dataclasses import dataclass, field
from typing import Any

from trueup.drift.causes import Cause, Certainty
from trueup.drift.story import Decrement, Entry, Usage, moment


@dataclass(frozen=True, kw_only=True)
class Found:
    """One cause of drift. `tokens` is positive if it made the counter too high.

    `at`: seconds since 1970. `entries`: the journal's entries that prove it; `rows`: the host's rows. `others`: causes
    that fit the entry too. `section`, `description`: of the request that made a stale write, by its log row and its
    decrement row; "": not known. `is_young`: no cause yet, the decrement of this log row may still arrive.
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
    description: str = ""
    is_young: bool = False


class BrokenChainError(Exception):
    """A change of the counter went unseen, so the journal proves nothing about this time."""


def log_row(row: Usage) -> dict[str, Any]:
    """Return a log row for the evidence of a report."""
    return {"log_id": row.id, "tokens": row.tokens, "created_at": moment(row.at), "success": row.counts}


def decrement_row(row: Decrement) -> dict[str, Any]:
    """Return a decrement row for the evidence of a report."""
    described = {"description": row.description} if row.description else {}
    return {"decrement_id": row.id, "tokens": row.tokens, "at": moment(row.at), **described}
