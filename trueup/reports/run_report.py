"""Drift reports on one run or on all runs since a time, from the database or from the summary of a dry run."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from psycopg.errors import QueryCanceled
from sqlalchemy import Connection, Row, Select, func, select
from sqlalchemy.exc import DBAPIError

from trueup.database.schema import own_table
from trueup.errors import NotFoundError
from trueup.host.mapping import HostMapping, UserIdType
from trueup.reconcile.runs import RunSummary
from trueup.reports.rows import DriftFilter, ReportRow, chosen_drifts, read_rows, row_of_finding
from trueup.reports.systemic import LOOK_BACK, SIGNS, SystemicCause, systemic_causes
from trueup.reports.totals import (
    SET_ASIDE,
    CauseFigures,
    SizeFigures,
    tally_actions,
    tally_causes,
    tally_findings,
    tally_sizes,
    tally_totals,
)
from trueup.reports.uncredited import UncreditedPacks, uncredited_packs

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Adding a field keeps the number. Renaming or removing a field, or changing its meaning, increases it.
SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """The findings of one run, or of all runs since a time. Token figures and the others are counts.

    `run_id` None: a dry run, which is not stored, or several runs. `runs`: number of runs in the report. `since` None:
    the report is about one run. `finished_at` None: the run has not ended. `checked`: comparisons made in all these
    runs; `counters`: the most that one of them made, so that each counter counts once. `counters_drifted`: counters
    that had a drift. `found_new`: drifts that no earlier run had seen. `in_review`: drifts that still wait for a
    decision. `set_aside`: drifts that need no decision: tolerated, ignored, or so new that their decrements may still
    arrive.
    `tokens_overstated`: used tokens that counters still show; `tokens_understated`: unused tokens that they don't show.
    `tokens_proven`, `tokens_inferred`: of the explained tokens, those of drifts with no less certain cause.
    `actions`: number of drifts by action. `rows`: the largest drifts first; `rows_left_out`: number of other drifts.
    `systemic`: the systemic causes of the time before the newest of these runs. `uncredited`: the packs that are paid
    for and not credited now. Both None: not looked for.
    """

    run_id: int | None
    runs: int
    kind: str
    dry_run: bool
    status: str
    since: datetime | None
    started_at: datetime
    finished_at: datetime | None
    filter: DriftFilter
    checked: int
    counters: int
    drifted: int
    counters_drifted: int
    found_new: int
    corrected: int
    in_review: int
    set_aside: int
    tokens_overstated: int
    tokens_understated: int
    tokens_explained: int
    tokens_proven: int
    tokens_inferred: int
    defects: int
    causes: list[CauseFigures]
    sizes: list[SizeFigures]
    actions: dict[str, int]
    rows: list[ReportRow]
    rows_left_out: int = 0
    systemic: list[SystemicCause] | None = None
    uncredited: UncreditedPacks | None = None

    @property
    def tokens_drifted(self) -> int:
        return self.tokens_overstated + self.tokens_understated

    @property
    def share_explained(self) -> float | None:
        """The share of the drifted tokens that has a cause, 0 to 1. None: no tokens have drifted."""
        return self.tokens_explained / self.tokens_drifted if self.tokens_drifted else None

    def summary_json(self) -> dict[str, Any]:
        """Return everything except the rows for JSON, with times in ISO 8601, in a versioned schema."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "filter")}
        return {
            "schema_version": SCHEMA_VERSION,
            **plain,
            "since": _iso(self.since),
            "started_at": self.started_at.isoformat(),
            "finished_at": _iso(self.finished_at),
            "filter": self.filter.as_json(),
            "tokens_drifted": self.tokens_drifted,
            "share_explained": self.share_explained,
            "causes": [asdict(figures) for figures in self.causes],
            "sizes": [asdict(figures) for figures in self.sizes],
            "systemic": None if self.systemic is None else [cause.as_json() for cause in self.systemic],
            "uncredited": None if self.uncredited is None else self.uncredited.as_json(),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the report for JSON; docs/drift-report.schema.json describes it."""
        return {**self.summary_json(), "rows": [row.as_json() for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class ReportSource:
    """The runs of a report, and the statement that selects their drifts."""

    run_id: int | None
    since: datetime | None
    filter: DriftFilter
    runs: list[Row[Any]] = field(repr=False)
    chosen: Select[Any] = field(repr=False)


_RUN = ("id", "kind", "only_user", "status", "started_at", "finished_at", "checked", "defects")


def find_source(
    connection: Connection,
    user_id_type: UserIdType,
    run_id: int | None = None,
    *,
    since: datetime | timedelta | None = None,
    only: DriftFilter | None = None,
) -> ReportSource | None:
    """Return the runs of a report. Returns None if there has been no run yet.

    `since`: all runs since this time, or within this duration before now; otherwise run `run_id`; both None: the newest
    run. `only` None: no filter. Raises `NotFoundError` for a run that does not exist.
    """
    run = own_table("reconcile_run", user_id_type)
    runs = select(*(run.c[name] for name in _RUN))
    only = only or DriftFilter()
    newest = connection.execute(runs.order_by(run.c.id.desc()).limit(1)).one_or_none()
    if newest is None and run_id is None:
        return None
    if since is not None:
        begin = since if isinstance(since, datetime) else connection.execute(select(func.now() - since)).scalar_one()
        rows = connection.execute(runs.where(run.c.started_at >= begin).order_by(run.c.id))
        chosen = chosen_drifts(user_id_type, only, since=begin)
        return ReportSource(run_id=None, since=begin, filter=only, runs=list(rows), chosen=chosen)
    found = newest
    if run_id is not None:
        found = connection.execute(runs.where(run.c.id == run_id)).one_or_none()
    if found is None:
        raise NotFoundError(f"run: reconcile run {run_id} does not exist. `trueup drift history` lists the runs.")
    chosen = chosen_drifts(user_id_type, only, run=found)
    return ReportSource(run_id=found.id, since=None, filter=only, runs=[found], chosen=chosen)


def read_source(
    connection: Connection, source: ReportSource, *, max_rows: int | None = None, skip: int = 0
) -> DriftReport:
    """Return the report on these runs.

    `max_rows`: only this many of the largest drifts get a row; None: all. `skip`: number of the largest drifts to leave
    out, because an earlier page has them.
    """
    totals = tally_totals(connection, source.chosen)
    rows = list(read_rows(connection, source.chosen, limit=max_rows, skip=skip))
    newest = source.runs[-1] if source.runs else None
    started_at = source.since or (newest.started_at if newest else None)
    assert started_at is not None  # noqa: S101 - for the type checker: a source has a time or a run
    return DriftReport(
        run_id=source.run_id,
        runs=len(source.runs),
        kind=newest.kind if newest else "quick",
        dry_run=False,
        status=newest.status if newest else "none",
        since=source.since,
        started_at=started_at,
        finished_at=newest.finished_at if newest else None,
        filter=source.filter,
        checked=sum(run.checked for run in source.runs),
        counters=max((run.checked for run in source.runs), default=0),
        defects=sum(run.defects for run in source.runs),
        **totals,
        causes=tally_causes(connection, source.chosen),
        sizes=tally_sizes(connection, source.chosen),
        actions=tally_actions(connection, source.chosen),
        rows=rows,
        rows_left_out=max(0, totals["drifted"] - skip - len(rows)),
        systemic=None,
        uncredited=None,
    )


def with_host_faults(
    connection: Connection, mapping: HostMapping, source: ReportSource, report: DriftReport, *, min_age_seconds: float
) -> DriftReport:
    """Return the report on `source` with the host's faults: systemic causes, and packs that were never credited.

    Both are left out of a report about some causes or sizes, and systemic causes also of one about one user.
    `min_age_seconds`: how long a decrement may take. What can't be read within the statement timeout stays None.
    """
    if replace(source.filter, user_id=None) != DriftFilter():
        return report

    def packs() -> UncreditedPacks | None:
        now = connection.execute(select(func.now())).scalar_one()
        return uncredited_packs(connection, mapping, at=now, only_user=source.filter.user_id)

    def causes() -> list[SystemicCause] | None:
        runs = [run for run in source.runs if run.only_user is None]
        if source.filter.user_id is not None or not runs:
            return None
        if not SIGNS & {cause.cause for cause in report.causes}:
            return []
        until = runs[-1].started_at - timedelta(seconds=min_age_seconds)
        since = min(until - LOOK_BACK, source.since or until)
        return systemic_causes(connection, mapping, since=since, until=until)

    return replace(
        report,
        systemic=_in_time(connection, "systemic causes", causes),
        uncredited=_in_time(connection, "packs that were never credited", packs),
    )


def _in_time(connection: Connection, what: str, read: Callable[[], T]) -> T | None:
    """Return what `read` returns; None, with a warning about `what`, if it takes longer than the statement timeout."""
    try:
        with connection.begin_nested():
            return read()
    except DBAPIError as error:
        if not isinstance(error.orig, QueryCanceled):
            raise
        logger.warning(
            "The drift report leaves out %s: reading them took longer than TRUEUP_STATEMENT_TIMEOUT_SECONDS", what
        )
        return None


def read_report(
    connection: Connection,
    user_id_type: UserIdType,
    run_id: int | None = None,
    *,
    since: datetime | timedelta | None = None,
    only: DriftFilter | None = None,
    max_rows: int | None = None,
) -> DriftReport | None:
    """Return a report, with the arguments of `find_source` and `read_source`. None: there has been no run yet.

    Raises `NotFoundError` for a run that does not exist.
    """
    source = find_source(connection, user_id_type, run_id, since=since, only=only)
    return read_source(connection, source, max_rows=max_rows) if source else None


def stream_rows(connection: Connection, source: ReportSource) -> Iterator[ReportRow]:
    """Yield every row of the report, the largest drifts first, in constant memory.

    `connection`: one in a transaction.
    """
    return read_rows(connection.execution_options(stream_results=True, max_row_buffer=1000), source.chosen)


def report_dry_run(summary: RunSummary) -> DriftReport:
    """Return the report on a dry run, from the findings in its summary."""
    rows = sorted((row_of_finding(finding) for finding in summary.findings), key=lambda row: -abs(row.drift))
    causes, sizes = tally_findings(rows)
    actions = dict(Counter(row.action for row in rows).most_common())
    return DriftReport(
        run_id=None,
        runs=1,
        kind=summary.kind,
        dry_run=True,
        status=summary.status,
        since=None,
        started_at=summary.started_at,
        finished_at=summary.finished_at,
        filter=DriftFilter(),
        checked=summary.checked,
        counters=summary.checked,
        drifted=summary.drifted,
        counters_drifted=summary.drifted,
        found_new=summary.found_new,
        corrected=summary.corrected,
        in_review=summary.in_review,
        set_aside=sum(actions.get(action, 0) for action in SET_ASIDE),
        tokens_overstated=summary.tokens_overstated,
        tokens_understated=summary.tokens_understated,
        tokens_explained=summary.tokens_explained,
        tokens_proven=summary.tokens_proven,
        tokens_inferred=summary.tokens_inferred,
        defects=summary.defects,
        causes=causes,
        sizes=sizes,
        actions=actions,
        rows=rows,
        rows_left_out=summary.drifted - len(rows),
    )


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
