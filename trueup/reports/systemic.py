"""Systemic causes: one fault of the host that is behind many drifts. They stand above the single drifts of a report.

A rule looks at all users since a time. It changes nothing about what is corrected.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any, Literal

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.host.mapping import HostMapping
from trueup.host.sql import INSTALLED, OwnTables, render_statement

Kind = Literal["decrement_not_run", "stale_writer"]
Dimension = Literal["host", "section", "model", "application", "description"]

LOOK_BACK = timedelta(days=30)
"""How far a report on runs looks back for systemic causes, unless it is about a longer time."""
# Without one of these, no systemic cause is looked for.
SIGNS = frozenset({"missed_decrement", "stale_write"})


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """From when on single faults are one systemic cause.

    `count`: at least this many faulty rows. `users`: on the counters of at least this many users. `share`: at least
    this share of all rows of the section, the model or the writer, 0 to 1.
    """

    count: int
    users: int
    share: Fraction


THRESHOLDS: dict[Kind, Threshold] = {
    "decrement_not_run": Threshold(count=20, users=3, share=Fraction(9, 10)),
    "stale_writer": Threshold(count=10, users=3, share=Fraction(1, 4)),
}
"""The thresholds of each systemic cause. They are chosen so that chance reaches none of them.

A decrement that fails now and then (a lost task, a crash) misses a few rows in a hundred. A decrement that does not run
misses all of them: nine in ten leave room for a repair by hand or a row that matches by chance. Requests that meet in
the same moment overwrite each other in a few writes of a hundred. A writer that keeps an object while others write
overwrites in most of its writes. One in four is far from both. Three users, because a fault of one account is a single
drift.
"""


@dataclass(frozen=True, kw_only=True)
class SystemicCause:
    """One fault of the host, and what it did.

    `dimension` and `name`: its limits; "host" and "": no limit. `since`: the first faulty row.
    `count`: the log rows without a decrement, or the stale writes, of `of` since then. `tokens`: of these log
    rows, or the overwritten ones. `users`: how many users' counters. `descriptions`: what the decrement rows beside the
    stale writes say most often; empty: nothing, or it is the name.
    """

    kind: Kind
    dimension: Dimension
    name: str
    since: datetime
    count: int
    of: int
    users: int
    tokens: int
    descriptions: tuple[str, ...] = ()

    @property
    def share(self) -> Fraction:
        return Fraction(self.count, self.of)

    @property
    def is_systemic(self) -> bool:
        limit = THRESHOLDS[self.kind]
        return self.count >= limit.count and self.users >= limit.users and self.share >= limit.share

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "since": self.since.isoformat(), "descriptions": list(self.descriptions)}


def systemic_causes(
    connection: Connection,
    mapping: HostMapping,
    *,
    since: datetime,
    until: datetime,
    drifted: Sequence[UserId] = (),
    own: OwnTables = INSTALLED,
) -> list[SystemicCause]:
    """Return the systemic causes of the time from `since` to `until`, the one with the most tokens first.

    `until`: when a run over all users began, less the time that a decrement may take: what is younger may be no drift.
    `drifted`: users whose counters missed decrements, besides the drifts that runs found. `own`: trueup's tables, or
    their substitutes. Reads all log rows of this time once.
    """
    journal_since = connection.scalar(_JOURNAL_SINCE) if own.installed else None
    stale: Sequence[Any] = ()
    if journal_since is not None:
        values = {"since": max(since, journal_since), "until": until, "least": THRESHOLDS["stale_writer"].count}
        stale = connection.execute(render_statement(_WRITERS, mapping, own), values).all()
    found = stale_writers(stale)
    # Only decrement rows or the journal show that a decrement did not run.
    begin = since if mapping.token_usage.table else max(since, journal_since or until)
    if begin < until:
        limit = THRESHOLDS["decrement_not_run"]
        values = {"since": begin, "until": until, "drifted": list(drifted)}
        values |= {"least": limit.count, "weight": _weight(limit.share)}
        groups = connection.execute(render_statement(_DECREMENTS, mapping, own), values).all()
        found += decrements_that_do_not_run(groups, stale if mapping.token_usage.table is None else ())
    return sorted(found, key=lambda one: (-one.tokens, one.kind, one.name))


def _weight(share: Fraction) -> int:
    """Return how many faulty rows outweigh a faultless one, so that their sum is positive above this share."""
    return int(share / (1 - share))


def decrements_that_do_not_run(rows: Iterable[Any], stale: Iterable[Any]) -> list[SystemicCause]:
    """Return where the decrement does not run: everywhere, or in which sections; else for which models.

    `rows`: the groups of log rows, `stale`: the stale writes by section, as systemic.sql describes them. Without
    decrement rows a stale write leaves its log row without a decrement of its size, although the decrement ran.
    """
    ran = {row.name: row.stale for row in stale if row.dimension == "section"}
    limit = THRESHOLDS["decrement_not_run"]
    found: dict[str, list[SystemicCause]] = {"host": [], "section": [], "model": []}
    runs_in_sections = False
    for row in rows:
        missing = row.missing - (ran.get(row.name, 0) if row.dimension == "section" else sum(ran.values()))
        group = _not_run(row, missing) if missing > 0 else None
        if group is not None and group.is_systemic:
            found[row.dimension].append(group)
        elif row.dimension == "section" and row.log_rows >= limit.count:
            runs_in_sections = True
    if found["host"] and not runs_in_sections:
        return found["host"]
    return found["section"] or found["model"] or found["host"]


def _not_run(row: Any, missing: int) -> SystemicCause:
    return SystemicCause(
        kind="decrement_not_run", dimension=row.dimension, name=row.name, since=row.first, count=missing,
        of=row.log_rows, users=row.users, tokens=row.tokens,
    )  # fmt: skip


def stale_writers(rows: Iterable[Any]) -> list[SystemicCause]:
    """Return the writers that overwrite the changes of others.

    By application, or by section or description of the decrement rows where that tells more. `rows`: the writers, as
    systemic.sql describes them.
    """
    writers = [
        SystemicCause(
            kind="stale_writer", dimension=row.dimension, name=row.name, since=row.first, count=row.stale,
            of=max(row.writes, row.stale), users=row.users, tokens=row.tokens, descriptions=tuple(row.descriptions),
        )
        for row in rows
        if row.writes is not None
    ]  # fmt: skip
    found = [writer for writer in writers if writer.is_systemic]
    order = ("description", "section", "application")
    best = max(found, key=lambda writer: (writer.share, order.index(writer.dimension)), default=None)
    return [writer for writer in found if best is not None and writer.dimension == best.dimension]


def sentence_of(cause: SystemicCause) -> str:
    """Return the finding in words, without the time since when."""
    where = f" in the {cause.dimension} {cause.name!r}" if cause.dimension != "host" else ""
    if cause.kind == "decrement_not_run":
        return (
            f"The decrement does not run{where}: {cause.count:,} of {cause.of:,} log rows have none, "
            f"{cause.tokens:,} tokens of {cause.users:,} users"
        )
    described = f" ({', '.join(map(repr, cause.descriptions))})" if cause.descriptions else ""
    if cause.dimension == "description":
        where = f" of the decrements {cause.name!r}"
    return (
        f"The writer{where}{described} saves values that it read before other changes: {cause.count:,} of its "
        f"{cause.of:,} writes overwrote {cause.tokens:,} tokens of {cause.users:,} users"
    )


REMEDIES: dict[Kind, str] = {
    "decrement_not_run": "Let the application lower the counter after these calls. Until then each run finds drift.",
    "stale_writer": "Let it lower the counter in the database (SET counter = counter - tokens), and not save the "
    "object that it has read.",
}

_JOURNAL_SINCE = text("SELECT trueup.journal_since()")
_DECREMENTS = '{% from "reports/systemic.sql" import decrements_by_group %}{{ decrements_by_group() }}'
_WRITERS = '{% from "reports/systemic.sql" import stale_writes_by_writer %}{{ stale_writes_by_writer() }}'
