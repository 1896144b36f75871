"""Runs that did not happen: no pass over all users, or no deep one, for too long."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.settings.alerts import AlertSettings
from trueup.settings.settings import get_settings


@dataclass(frozen=True, kw_only=True)
class MissedRun:
    """A gap in the runs. `kind`: "missed" is any run over all users, "missed_deep" a deep one.

    `last`: when the last one ended, or trueup was set up; `seconds`: how long ago that is.
    """

    kind: str
    last: datetime
    seconds: int

    @property
    def message(self) -> str:
        run = "deep reconcile run" if self.kind == "missed_deep" else "reconcile run"
        return f"No {run} has ended for {self.seconds:,} s; the last one did at {self.last:%Y-%m-%d %H:%M:%S} UTC."

    def content(self) -> dict[str, Any]:
        """Return what an alert says of it."""
        return {"message": self.message, "last_run_ended_at": self.last.isoformat(), "seconds": self.seconds}


# Before the first run, the time when trueup was set up stands for it.
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
    """Return what runs are missing for longer than they may; empty: all is well. `settings` None: this process's."""
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
    """Return the setting, by default twice the interval; 0: never too long."""
    return 2 * interval_seconds if seconds is None else seconds
