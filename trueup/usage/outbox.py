"""The outbox: a task's side effects that must not happen twice. Each is recorded in a row before the first try."""

import json
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.settings.settings import get_settings

EffectStatus = Literal["sending", "sent", "unknown", "failed"]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A side effect of a task.

    `status`: "sending" (an attempt is doing it, or died while doing it), "sent" (it happened), "failed" (it certainly
    did not happen) or "unknown" (it may have happened). `detail`: the request and the answer, JSON-safe. `tries`: the
    number of tries that began.
    """

    user_id: UserId
    task_id: str
    effect: str
    status: EffectStatus
    detail: dict[str, Any]
    updated_at: datetime
    tries: int


# A new or failed effect gets the status "sending" and may be tried. An effect that an earlier attempt left in "sending"
# becomes "unknown": that attempt is dead, and it is not known whether the effect happened.
_BEGIN = text(
    """
    INSERT INTO trueup.outbox AS o (user_id, task_id, effect, status, detail, created_at, updated_at)
        VALUES (:user_id, :task_id, :effect, 'sending', CAST(:detail AS jsonb),
                coalesce(CAST(:now AS timestamptz), clock_timestamp()),
                coalesce(CAST(:now AS timestamptz), clock_timestamp()))
        ON CONFLICT (user_id, task_id, effect) DO UPDATE
        SET status = CASE WHEN o.status = 'failed' THEN 'sending'
                          WHEN o.status = 'sending' THEN 'unknown' ELSE o.status END,
            detail = CASE WHEN o.status = 'failed' THEN excluded.detail ELSE o.detail END,
            tries = o.tries + CASE WHEN o.status = 'failed' THEN 1 ELSE 0 END,
            updated_at = excluded.updated_at
        RETURNING o.status, o.detail, o.updated_at, o.tries
    """
)


def begin_effect(
    connection: Connection,
    *,
    user_id: UserId,
    task_id: str,
    effect: str,
    detail: dict[str, Any],
    now: datetime | None = None,
) -> Effect:
    """Record that a side effect begins. Do it only if the returned status is "sending", then call `finish_effect`.

    "sent": an earlier attempt did it. "unknown": an earlier attempt died while doing it.
    Commit before doing the effect. `detail`: the request, JSON-safe. `now` None: the database's clock.
    """
    row = connection.execute(
        _BEGIN,
        {
            "user_id": user_id,
            "task_id": task_id,
            "effect": effect,
            "detail": json.dumps(detail),
            "now": now,
        },
    ).one()
    return Effect(
        user_id=user_id,
        task_id=task_id,
        effect=effect,
        status=row.status,
        detail=row.detail,
        updated_at=row.updated_at,
        tries=row.tries,
    )


_COLUMNS = ", ".join(field.name for field in fields(Effect))

_FIND = text(
    f"SELECT {_COLUMNS} FROM trueup.outbox WHERE user_id = :user_id AND task_id = :task_id AND effect = :effect"
)


def find_effect(connection: Connection, *, user_id: UserId, task_id: str, effect: str) -> Effect | None:
    """Return the current state of a side effect; None if it was never tried."""
    place = {"user_id": user_id, "task_id": task_id, "effect": effect}
    row = connection.execute(_FIND, place).mappings().one_or_none()
    return Effect(**row) if row else None


_REOPEN = text(
    """
    UPDATE trueup.outbox SET status = 'sending', tries = tries + 1, updated_at = clock_timestamp()
    WHERE user_id = :user_id AND task_id = :task_id AND effect = :effect AND status = 'unknown'
    RETURNING tries
    """
)


def reopen_effect(connection: Connection, effect: Effect) -> Effect:
    """Begin a new try of an "unknown" side effect, for a host that prefers doing it twice to not doing it.

    Do it only if the returned status is "sending": an attempt that seemed dead may have recorded its result meanwhile.
    """
    place: dict[str, Any] = {"user_id": effect.user_id, "task_id": effect.task_id, "effect": effect.effect}
    tries = connection.scalar(_REOPEN, place)
    if tries is not None:
        return replace(effect, status="sending", tries=tries)
    return find_effect(connection, **place) or effect


# "sent" is final, even if an attempt that seemed dead reports another status later. Any other status counts only for
# the try that it belongs to: a late or repeated report must not change a later try.
_FINISH = text(
    """
    UPDATE trueup.outbox SET status = :status, detail = detail || CAST(:detail AS jsonb),
                             updated_at = coalesce(CAST(:now AS timestamptz), clock_timestamp())
    WHERE user_id = :user_id AND task_id = :task_id AND effect = :effect
      AND (:status = 'sent' OR (status <> 'sent' AND tries = :tries))
    """
)


def finish_effect(
    connection: Connection,
    effect: Effect,
    status: EffectStatus,
    *,
    detail: dict[str, Any] | None = None,
    now: datetime | None = None,
) -> None:
    """Record how a side effect ended; `detail` is merged into the stored detail. `now` None: the database's clock."""
    connection.execute(
        _FINISH,
        {
            "user_id": effect.user_id,
            "task_id": effect.task_id,
            "effect": effect.effect,
            "tries": effect.tries,
            "status": status,
            "detail": json.dumps(detail or {}),
            "now": now,
        },
    )


# "sending" for longer than any task may take: the attempt is dead.
_UNRESOLVED = """
    FROM trueup.outbox WHERE status = 'unknown' OR (status = 'sending' AND updated_at <
        coalesce(CAST(:now AS timestamptz), clock_timestamp()) - make_interval(secs => :time_limit_seconds))
"""
_LIST = text(f"SELECT {_COLUMNS} {_UNRESOLVED} ORDER BY updated_at DESC LIMIT :limit")
_COUNT = text(f"SELECT count(*) {_UNRESOLVED}")


def list_unresolved_effects(connection: Connection, *, limit: int = 100) -> list[Effect]:
    """Return side effects that may or may not have happened, newest first, at most `limit`."""
    values = {"now": None, "time_limit_seconds": get_settings().task_time_limit_seconds, "limit": limit}
    return [Effect(**row) for row in connection.execute(_LIST, values).mappings()]


def count_unresolved_effects(connection: Connection, now: datetime) -> int:
    """Return how many side effects may or may not have happened, as of `now`."""
    values = {"now": now, "time_limit_seconds": get_settings().task_time_limit_seconds}
    return int(connection.execute(_COUNT, values).scalar_one())
