"""Requests for tasks over HTTP: the owner of each task, and one task for each idempotency key.

The request's row is written before the task is sent, and contains the task's id. If sending failed, or its result is
unknown, the next request with the same key sends the task again under the same id, and the gate runs it once.
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
"""How long a request is kept, the same as Celery keeps results. After that its key is free again."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task that a user has requested. `sent_at` None: the task may not have been sent yet."""

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
# An existing row is returned unchanged. The update without effect makes PostgreSQL return the row, and wait for a
# concurrent transaction that inserts the same key.
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
    """Return the SHA-256 fingerprint of a task's name and its JSON-safe arguments."""
    return hashlib.sha256(json.dumps([task, arguments], sort_keys=True).encode()).hexdigest()


def find_request(
    connection: Connection, user_id: UserId, idempotency_key: str, *, now: datetime | None = None
) -> TaskRequest | None:
    """Return the user's request with that key; None: there is none within `KEPT`. `now` None: the database's clock."""
    return _one(connection, _FIND_BY_KEY, {"user_id": user_id, "key": idempotency_key}, now)


def find_request_of_task(
    connection: Connection, user_id: UserId, task_id: str, *, now: datetime | None = None
) -> TaskRequest | None:
    """Return the user's request for this task; None: the task is not the user's. `now` None: the database's clock."""
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
    """Record a request and return it, or return the existing request with the same key.

    Idempotent. The caller compares fingerprints, commits, sends the returned request's task if `sent_at` is None, and
    calls `mark_sent`. `now` None: the database's clock.
    """
    place = {"user_id": user_id, "key": idempotency_key}
    connection.execute(_FORGET, {**place, "now": now, "kept": KEPT})
    values = {**place, "fingerprint": fingerprint, "task_id": task_id, "task": task, "now": now}
    return _request(connection.execute(_BEGIN, values).mappings().one())


def mark_sent(connection: Connection, request: TaskRequest, *, now: datetime | None = None) -> None:
    """Record that the broker has accepted the task. `now` None: the database's clock."""
    connection.execute(_MARK_SENT, {"user_id": request.user_id, "task_id": request.task_id, "now": now})


def prune_requests(connection: Connection, *, limit: int, now: datetime | None = None) -> int:
    """Delete requests older than `KEPT`, at most `limit`. Returns how many. `now` None: the database's clock."""
    return connection.execute(_PRUNE, {"limit": limit, "now": now, "kept": KEPT}).rowcount


def _one(connection: Connection, statement: Any, values: dict[str, Any], now: datetime | None) -> TaskRequest | None:
    row = connection.execute(statement, {**values, "now": now, "kept": KEPT}).mappings().one_or_none()
    return _request(row) if row else None


def _request(row: RowMapping) -> TaskRequest:
    return TaskRequest(**row)
