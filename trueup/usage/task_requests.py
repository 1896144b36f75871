"""Tasks that were asked for over HTTP: whose each is, and one task for one idempotency key.

The row is written before the task is sent and names the task's id. A sending that failed, or of which nobody knows, is
repeated by the next request of the same key: the same id, so that the gate makes one task of both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, text

from trueup.accounts.user_ids import UserId

KEPT = timedelta(hours=24)
"""How long a request is known; Celery keeps results for as long. Then its key may be used anew."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task that a user has asked for. `sent_at` None: it may not have been sent yet."""

    user_id: UserId
    idempotency_key: str
    fingerprint: str
    task_id: str
    task: str
    created_at: datetime
    sent_at: datetime | None


_COLUMNS = ", ".join(field.name for field in fields(TaskRequest))
_KNOWN = "created_at > coalesce(CAST(:now AS timestamptz), clock_timestamp()) - CAST(:kept AS interval)"

_FIND_BY_KEY = text(
    f"SELECT {_COLUMNS} FROM trueup.task_request WHERE user_id = :user_id AND idempotency_key = :key AND {_KNOWN}"
)
_FIND_BY_TASK = text(
    f"SELECT {_COLUMNS} FROM trueup.task_request WHERE user_id = :user_id AND task_id = :task_id AND {_KNOWN}"
)
_FORGET = text(f"DELETE FROM trueup.task_request WHERE user_id = :user_id AND idempotency_key = :key AND NOT {_KNOWN}")
# The row that is there is given back as it is; updating it to itself is what makes PostgreSQL return it, and wait for a
# request of the same key that is just being written.
_BEGIN = text(
    f"""
    INSERT INTO trueup.task_request AS r (user_id, idempotency_key, fingerprint, task_id, task, created_at)
        VALUES (:user_id, :key, :fingerprint, :task_id, :task,
                coalesce(CAST(:now AS timestamptz), clock_timestamp()))
        ON CONFLICT (user_id, idempotency_key) DO UPDATE SET task_id = r.task_id
        RETURNING {_COLUMNS}
    """
)
_MARK_SENT = text(
    "UPDATE trueup.task_request SET sent_at = coalesce(CAST(:now AS timestamptz), clock_timestamp()) "
    "WHERE user_id = :user_id AND task_id = :task_id AND sent_at IS NULL"
)
_PRUNE = text(
    f"""
    DELETE FROM trueup.task_request WHERE (user_id, idempotency_key) IN
        (SELECT user_id, idempotency_key FROM trueup.task_request WHERE NOT {_KNOWN}
         ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED)
    """
)


def fingerprint_of(task: str, arguments: Mapping[str, Any]) -> str:
    """Identify what is asked for: a task with its JSON-safe arguments."""
    return hashlib.sha256(json.dumps([task, arguments], sort_keys=True).encode()).hexdigest()


def find_request(
    connection: Connection, user_id: UserId, idempotency_key: str, *, now: datetime | None = None
) -> TaskRequest | None:
    """Return the user's request of that key; None: there is none within `KEPT`. `now`: None: the database's clock."""
    return _one(connection, _FIND_BY_KEY, {"user_id": user_id, "key": idempotency_key}, now)


def find_request_of_task(
    connection: Connection, user_id: UserId, task_id: str, *, now: datetime | None = None
) -> TaskRequest | None:
    """Return the user's request that this task came of; None: it is not the user's. `now`: as with `find_request`."""
    return _one(connection, _FIND_BY_TASK, {"user_id": user_id, "task_id": task_id}, now)


def begin_request(
    connection: Connection,
    *,
    user_id: UserId,
    idempotency_key: str,
    fingerprint: str,
    task_id: str,
    task: str,
    now: datetime | None = None,
) -> TaskRequest:
    """Write a request, and return it; or, as it stands, the one of the same key that is there.

    Safe to repeat. The caller compares fingerprints, commits, sends the task of the returned request unless
    `sent_at` says that it was, and calls `mark_sent`. `now`: None means the database's clock.
    """
    place = {"user_id": user_id, "key": idempotency_key}
    connection.execute(_FORGET, {**place, "now": now, "kept": KEPT})
    values = {**place, "fingerprint": fingerprint, "task_id": task_id, "task": task, "now": now}
    return _request(connection.execute(_BEGIN, values).mappings().one())


def mark_sent(connection: Connection, request: TaskRequest, *, now: datetime | None = None) -> None:
    """Note that the broker has the task. `now`: None means the database's clock."""
    connection.execute(_MARK_SENT, {"user_id": request.user_id, "task_id": request.task_id, "now": now})


def prune_requests(connection: Connection, *, limit: int, now: datetime | None = None) -> int:
    """Forget requests older than `KEPT`, at most `limit`. Returns how many. `now`: None: the database's clock."""
    return connection.execute(_PRUNE, {"limit": limit, "now": now, "kept": KEPT}).rowcount


def _one(connection: Connection, statement: Any, values: dict[str, Any], now: datetime | None) -> TaskRequest | None:
    row = connection.execute(statement, {**values, "now": now, "kept": KEPT}).mappings().one_or_none()
    return _request(row) if row else None


def _request(row: RowMapping) -> TaskRequest:
    return TaskRequest(**row)
