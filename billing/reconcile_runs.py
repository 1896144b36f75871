"""Reconcile runs: one at a time, each a row that is brought up to date after every batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from billing.causes import Explanation
from billing.drifts import Drift
from billing.errors import TrueupError
from billing.mapping import UserIdType
from billing.policies import Verdict
from billing.schema import own_table
from billing.users import UserId

# "reconcil" in ASCII: the key of the advisory lock that keeps runs apart.
RUN_LOCK = 0x7265636F6E63696C


class RunInProgressError(TrueupError):
    """Another reconcile run is at work on this database; this one did nothing."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A drift, why it is there, what may be done, and what was done: corrected, reported, review, lost_race, …

    `written`: the value the counter was set to; None if it was left alone.
    """

    drift: Drift
    explanation: Explanation
    verdict: Verdict
    action: str
    written: int | None


@dataclass(kw_only=True)
class RunSummary:
    """What a run found. `run_id` None: a dry run, of which no row is kept. Token figures are counts."""

    run_id: int | None
    dry_run: bool
    started_at: datetime
    finished_at: datetime | None = None
    checked: int = 0
    drifted: int = 0
    corrected: int = 0
    tokens_overstated: int = 0
    tokens_understated: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, checked: int, findings: Sequence[Finding]) -> None:
        self.checked += checked
        self.drifted += len(findings)
        self.corrected += sum(finding.action == "corrected" for finding in findings)
        self.tokens_overstated += sum(max(0, finding.drift.tokens) for finding in findings)
        self.tokens_understated += sum(max(0, -finding.drift.tokens) for finding in findings)


@contextmanager
def only_run(connection: Connection) -> Iterator[None]:
    """Be the only run on this database, or raise `RunInProgressError`.

    An advisory lock: it belongs to the session, so a run that dies gives it back.
    """
    locked = connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": RUN_LOCK})
    connection.rollback()
    if not locked:
        raise RunInProgressError(
            "Another reconcile run is at work on this database. Wait for it to end, then try again."
        )
    try:
        yield
    finally:
        try:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": RUN_LOCK})
            connection.rollback()
        except DBAPIError:
            # The lock ends with its session, at the latest here: in the pool it would keep out every later run.
            connection.invalidate()


def start_run(
    connection: Connection, user_id_type: UserIdType, *, dry_run: bool, only_user: UserId | None
) -> RunSummary:
    """Begin a run, and mark those that died as interrupted. A dry run leaves no row."""
    now = connection.scalar(text("SELECT clock_timestamp()"))
    connection.rollback()
    assert isinstance(now, datetime)  # noqa: S101 - for the type checker: a query of one value
    summary = RunSummary(run_id=None, dry_run=dry_run, started_at=now)
    if not dry_run:
        run = own_table("reconcile_run", user_id_type)
        with connection.begin():
            # We hold the lock, so whoever left a run "running" is dead.
            connection.execute(
                update(run)
                .where(run.c.status == "running")
                .values(status="interrupted", finished_at=func.clock_timestamp())
            )
            summary.run_id = connection.execute(
                insert(run)
                .values(
                    dry_run=False,
                    only_user=None if only_user is None else str(only_user),
                    status="running",
                    started_at=now,
                )
                .returning(run.c.id)
            ).scalar_one()
    return summary


def save_run(connection: Connection, user_id_type: UserIdType, summary: RunSummary, **more: Any) -> None:
    """Write the run's figures so far, so that its progress can be seen; nothing for a dry run."""
    if summary.run_id is None:
        return
    run = own_table("reconcile_run", user_id_type)
    with connection.begin():
        connection.execute(
            update(run)
            .where(run.c.id == summary.run_id)
            .values(
                checked=summary.checked,
                drifted=summary.drifted,
                corrected=summary.corrected,
                tokens_overstated=summary.tokens_overstated,
                tokens_understated=summary.tokens_understated,
                **more,
            )
        )


def finish_run(
    connection: Connection,
    user_id_type: UserIdType,
    summary: RunSummary,
    *,
    status: str,
    error: str | None,
) -> None:
    """End a run as "finished" or "failed". `error` None: there was none."""
    summary.finished_at = connection.scalar(select(func.clock_timestamp()))
    connection.rollback()
    save_run(
        connection,
        user_id_type,
        summary,
        status=status,
        error=error,
        finished_at=summary.finished_at,
    )
