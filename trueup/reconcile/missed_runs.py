"""Missed runs: no reconcile run over all users, or no deep run, has finished for too long."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.settings.alerts import AlertSettings
from trueup.settings.settings import get_settings


@dataclass(frozen=True, kw_only=True)
class MissedRun:
    """A gap in the runs. `kind`: "missed" is about any run over all users, "missed_deep" about deep runs.

    `last`: when the last such run finished, or when trueup was installed if there was none. `seconds`: time since then.
    """

    kind: str
    last: datetime
    seconds: int

    @property
    def message(self) -> str:
        run = "deep reconcile run" if self.kind == "missed_deep" else "reconcile run"
        return (
            f"No {run} has finished for {self.seconds:,} s, since {self.last:%Y-%m-%d %H:%M:%S} UTC. New drifts are "
            "not found. Check that a worker and the scheduler are running."
        )

    def content(self) -> dict[str, Any]:
        """Return the data of an alert about this gap."""
        return {"message": self.message, "last_run_ended_at": self.last.isoformat(), "seconds": self.seconds}


# Before the first run, the gap is counted from the time of installation.
_LAST_RUNS = text(
    """
    SELECT r.kind, coalesce(r.ended, i.installed_at) AS last,
           extract(epoch FROM clock_timestamp() - coalesce(r.ended, i.installed_at)) AS seconds
    FROM trueup.installation i, (
        SELECT unnest(ARRAY['missed', 'missed_deep']) AS kind,
               unnest(ARRAY[max(finished_at), max(finished_at) FILTER (WHERE kind = 'deep')]) AS ended
        FROM trueup.reconcile_run WHERE status = 'finished' AND only_user IS NULL AND NOT dry_run) r
    """
)


def find_missed_runs(connection: Connection, *, settings: AlertSettings | None = None) -> list[MissedRun]:
    """Return the gaps that are longer than the settings allow. `settings` None: this process's settings."""
    settings = settings or get_settings().alerts
    limits = {
        "missed": _limit(settings.missed_run_seconds, get_settings().reconcile_interval_seconds),
        "missed_deep": _limit(settings.missed_deep_run_seconds, get_settings().reconcile_deep_interval_seconds),
    }
    found = [
        MissedRun(kind=row.kind, last=row.last, seconds=int(row.seconds)) for row in connection.execute(_LAST_RUNS)
    ]
    return [missed for missed in found if 0 < limits[missed.kind] < missed.seconds]


def _limit(seconds: int | None, interval_seconds: int) -> int:
    """Return the setting in seconds, by default twice the interval. 0: no limit."""
    return 2 * interval_seconds if seconds is None else seconds
