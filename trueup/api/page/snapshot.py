"""All figures of the live page, read from one snapshot of the database."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from trueup.database.engine import transaction
from trueup.errors import LogChangedError, ServiceUnavailableError
from trueup.gate.holds import HoldRow, list_holds
from trueup.gate.modes import DeniedTasks, list_denied_tasks
from trueup.host.mapping import UserIdType
from trueup.monitoring.alerts import Alert, list_alerts
from trueup.monitoring.at_risk import AtRisk, count_reviews, list_at_risk
from trueup.monitoring.status import read_gauges
from trueup.reconcile.missed_runs import MissedRun, find_missed_runs
from trueup.reports.history import RunFigures, read_history
from trueup.review.decisions import ReviewItem, list_reviews

MAX_ROWS = 20
MAX_REVIEWS = 50
MAX_RUNS = 60
MAX_ALERTS = 10
DENIED_HOURS = 24
# A page must not keep a busy database busy: what takes longer is not shown.
STATEMENT_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The figures at one time. Lists have bounds; `in_review` counts all. `runs`: over all users, the oldest first."""

    at: datetime
    gauges: dict[str, float | None]
    at_risk: Sequence[AtRisk]
    holds: Sequence[HoldRow]
    denied: Sequence[DeniedTasks]
    in_review: int
    reviews: Sequence[ReviewItem]
    runs: Sequence[RunFigures]
    alerts: Sequence[Alert]
    missed: Sequence[MissedRun]


def read_snapshot(user_id_type: UserIdType) -> Snapshot:
    """Read the figures. Raises `ServiceUnavailableError` or `NotInstalledError`.

    A connection that died in the pool, or a log that changed, is tried once more.
    """
    try:
        with transaction() as connection:
            return _read(connection, user_id_type)
    except (ServiceUnavailableError, LogChangedError):
        with transaction() as connection:
            return _read(connection, user_id_type)


def _read(connection: Connection, user_id_type: UserIdType) -> Snapshot:
    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
    connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'"))
    runs = read_history(connection, user_id_type, limit=MAX_RUNS)
    return Snapshot(
        at=connection.execute(text("SELECT clock_timestamp()")).scalar_one(),
        gauges={name: value for name, (value, _) in read_gauges(connection).items()},
        at_risk=list_at_risk(connection, limit=MAX_ROWS),
        holds=list_holds(connection, oldest_first=True, limit=MAX_ROWS),
        denied=list_denied_tasks(connection, hours=DENIED_HOURS),
        in_review=count_reviews(connection),
        reviews=list_reviews(connection, user_id_type, limit=MAX_REVIEWS),
        runs=[run for run in runs if run.only_user is None],
        alerts=list_alerts(connection, limit=MAX_ALERTS),
        missed=find_missed_runs(connection),
    )
