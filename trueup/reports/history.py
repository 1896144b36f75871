"""The history of reconcile runs: the recorded figures of each run, which show how drift develops."""

from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from trueup.database.schema import own_table
from trueup.host.mapping import UserIdType

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run. Token figures and the others are counts. `only_user` None: the run checked all users.

    `finished_at` None: the run has not ended. `error` None: no error. `requested_by` empty: the schedule started it.
    """

    id: int
    kind: str
    only_user: str | None
    status: str
    started_at: datetime
    finished_at: datetime | None
    checked: int
    drifted: int
    found_new: int
    corrected: int
    in_review: int
    tokens_overstated: int
    tokens_understated: int
    tokens_explained: int
    defects: int
    error: str | None
    requested_by: str

    @property
    def tokens_drifted(self) -> int:
        return self.tokens_overstated + self.tokens_understated

    @property
    def share_explained(self) -> float | None:
        """The share of the drifted tokens that has a cause, 0 to 1. None: no tokens have drifted."""
        return min(1.0, self.tokens_explained / self.tokens_drifted) if self.tokens_drifted else None

    @property
    def seconds(self) -> float | None:
        """The run's duration in seconds. None: the run has not ended."""
        return (self.finished_at - self.started_at).total_seconds() if self.finished_at else None

    def as_json(self) -> dict[str, Any]:
        """Return the run for JSON, with times in ISO 8601."""
        content = asdict(self)
        content["run_id"] = content.pop("id")
        for name in ("started_at", "finished_at"):
            content[name] = content[name].isoformat() if content[name] else None
        return content | {"tokens_drifted": self.tokens_drifted, "share_explained": self.share_explained}


def read_history(
    connection: Connection,
    user_id_type: UserIdType,
    *,
    limit: int = 30,
    since: datetime | None = None,
    up_to_run: int | None = None,
) -> list[RunFigures]:
    """Return the newest runs, at most `limit`, in the order of their start.

    `since`: only runs that started from then on; None: runs of any age. `up_to_run`: the number of the last
    run; None: the newest.
    """
    run = own_table("reconcile_run", user_id_type).c
    query = select(*(run[field.name] for field in fields(RunFigures))).order_by(run.id.desc()).limit(limit)
    if since is not None:
        query = query.where(run.started_at >= since)
    if up_to_run is not None:
        query = query.where(run.id <= up_to_run)
    return [RunFigures(**row) for row in connection.execute(query).mappings()][::-1]


def history_json(runs: list[RunFigures]) -> dict[str, Any]:
    """Return the history for JSON, in a versioned schema."""
    return {"schema_version": SCHEMA_VERSION, "runs": [run.as_json() for run in runs]}
