"""Holds: tokens set aside for one running task, from the gate until its last charge."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, case, select, text

from trueup.accounts.account import days_between
from trueup.accounts.subscriptions import refuse_several_subscriptions
from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_estimate
from trueup.database.schema import own_table
from trueup.errors import DenialPayload, HoldBusyError, TokensDenied
from trueup.gate.denial import describe_denial
from trueup.settings.settings import get_settings


@dataclass(frozen=True, kw_only=True)
class Hold:
    """An open hold, as one attempt of its task sees it.

    `tokens_left`: count still set aside.
    `attempt`: 1 for the first delivery, one more for each later one. It fences earlier attempts.
    `reattached`: an earlier attempt opened the hold.
    `replay`: an earlier attempt completed the task's work. The hold has no tokens; charged calls are replayed.
    `overridden`: the reason code of a denial that the feature's mode overrode. None: the gate admitted the task.
    `ordinals`: the numbers of the hold's calls, shared by all model clients of the hold. Two calls with the same
    number would be one charge.
    """

    user_id: UserId
    task_id: str
    feature_name: str
    section: str
    attempt: int
    reattached: bool
    replay: bool
    tokens_left: int
    expires_at: datetime
    overridden: str | None = None
    ordinals: Iterator[int] = field(default_factory=lambda: itertools.count(1), init=False, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class HoldRow:
    """A row of the table of holds, for display. Tokens are counts. `closed_at` None: the hold is open."""

    user_id: UserId
    task_id: str
    feature_name: str
    status: str
    attempt: int
    owner: str
    tokens_reserved: int
    tokens_charged: int
    tokens_left: int
    opened_at: datetime
    expires_at: datetime
    closed_at: datetime | None


_OPEN = text(
    """
    SELECT * FROM trueup.open_hold(:user_id, :task_id, :retries, :feature_name, :section, :owner, :tokens,
                                   make_interval(secs => :lease_seconds), make_interval(secs => :ttl_seconds), :waits,
                                   :mode, CAST(:now AS timestamptz))
    """
)


def open_hold(
    connection: Connection,
    *,
    user_id: UserId,
    task_id: str,
    feature_name: str,
    section: str,
    estimated_tokens: int,
    owner: str,
    lease_seconds: float,
    ttl_seconds: float,
    retries: int = 0,
    waits: int = 0,
    now: datetime | None = None,
) -> Hold:
    """Reserve tokens for a task in one round trip, or return the open hold of the task to its next attempt.

    Idempotent by task id. The locked balance row decides: two callers can't both take the last tokens. A task whose
    body has returned gets a hold without tokens, to replay the calls that it has paid for.

    `estimated_tokens`: count to reserve. `owner`: names the process, for display.
    `lease_seconds`: the time during which no later attempt can take the hold over, unless its `retries` are higher,
    which proves that this attempt has ended. `ttl_seconds`: the hold expires after this time without a heartbeat.
    `waits`: the number that the last `HoldBusyError` gave to this message. `now`: None means the database's clock.
    Raises `TokensDenied` with the specification's payload, `HoldBusyError` while another attempt has the hold,
    `InvalidInputError` for a malformed estimate, `SeveralSubscriptionsError`.
    """
    result = connection.execute(
        _OPEN,
        {
            "user_id": user_id,
            "task_id": task_id,
            "retries": retries,
            "feature_name": feature_name,
            "section": section,
            "owner": owner,
            "tokens": check_estimate(estimated_tokens),
            "lease_seconds": lease_seconds,
            "ttl_seconds": ttl_seconds,
            "waits": waits,
            "mode": get_settings().gate.mode_of(feature_name),
            "now": now,
        },
    )
    try:
        row = result.one()
    except Exception:
        # The hold is committed, and this caller never learns of it. Its tokens would be held until it expires.
        close_abandoned_hold(connection, user_id, task_id, owner=owner, now=now)
        raise
    if row.reason == "subscription_deactivated":
        refuse_several_subscriptions(connection, user_id)
    if row.reason is not None:
        raise _denied(row, feature_name, estimated_tokens)
    if row.busy_until is not None:
        seconds = (row.busy_until - row.at).total_seconds()
        raise HoldBusyError(task_id, seconds, redundant=row.redundant, waits=row.waits)
    return Hold(
        user_id=user_id,
        task_id=task_id,
        feature_name=feature_name,
        section=section,
        attempt=row.hold_attempt,
        reattached=row.reattached,
        replay=row.replay,
        tokens_left=row.tokens_left,
        expires_at=row.expiry,
        overridden=row.overridden,
    )


_CLOSE = text(
    "SELECT trueup.close_hold(:user_id, :task_id, :attempt, :owner, :completed, CAST(:now AS timestamptz)) AS status"
)


def close_hold(
    connection: Connection, hold: Hold, *, completed: bool = False, now: datetime | None = None
) -> str | None:
    """Close a hold and release its remaining tokens. Idempotent: a hold ends once.

    `completed`: the task's body has returned, so a redelivery buys nothing. `now`: None means the database's clock.
    Returns "settled" or "released"; None if the hold is closed or belongs to a later attempt; "open" if an earlier
    attempt may still be in a call: the call's maximum cost stays held until it is charged or the hold expires.
    """
    values = {"attempt": hold.attempt, "owner": None, "completed": completed, "now": now}
    return _close(connection, hold.user_id, hold.task_id, values)


def close_abandoned_hold(
    connection: Connection, user_id: UserId, task_id: str, *, owner: str, now: datetime | None = None
) -> str | None:
    """Close the hold of a task whose owner has died, as the caller knows, and release its remaining tokens.

    Returns as `close_hold` does; also None if the hold belongs to another owner, who may be alive.
    """
    values = {"attempt": None, "owner": owner, "completed": False, "now": now}
    return _close(connection, user_id, task_id, values)


def _close(connection: Connection, user_id: UserId, task_id: str, values: dict[str, Any]) -> str | None:
    status: str | None = connection.execute(_CLOSE, {"user_id": user_id, "task_id": task_id, **values}).scalar_one()
    return status


_ABANDON = text("SELECT trueup.abandon_calls(:user_id, :task_id, :owner)")


def abandon_calls(connection: Connection, user_id: UserId, task_id: str, *, owner: str) -> None:
    """Record that a dead owner's calls are no longer in flight. The caller knows that the owner has died.

    The next attempt may then spend their tokens. Does nothing if the hold belongs to another owner.
    """
    connection.execute(_ABANDON, {"user_id": user_id, "task_id": task_id, "owner": owner})


def has_later_attempt(connection: Connection, hold: Hold) -> bool:
    """Return whether a later attempt of the hold's task was admitted: then this attempt is an outdated duplicate."""
    holds = own_table("hold", get_settings().host.user_id_type).c
    query = select(holds.id).where(
        holds.user_id == hold.user_id, holds.task_id == hold.task_id, holds.attempt > hold.attempt
    )
    return connection.scalar(select(query.exists())) or False


_EXPIRE = text("SELECT holds, tokens FROM trueup.expire_holds(:limit, CAST(:now AS timestamptz))")


def expire_holds(connection: Connection, *, limit: int = 1000, now: datetime | None = None) -> tuple[int, int]:
    """End overdue holds, whose owners have died. `limit`: the maximum number of holds to look for.

    `now`: None means the database's clock. Returns the number of ended holds, and the count of released tokens.
    """
    row = connection.execute(_EXPIRE, {"limit": limit, "now": now}).one()
    return row.holds, row.tokens


def list_holds(
    connection: Connection,
    *,
    user_id: UserId | None = None,
    every_status: bool = False,
    limit: int = 100,
) -> list[HoldRow]:
    """Return open holds, newest first; with `every_status` also ended ones. `user_id` None: holds of all users."""
    hold = own_table("hold", get_settings().host.user_id_type).c
    tokens_left = case((hold.status == "open", hold.tokens_reserved - hold.tokens_covered), else_=0)
    names = [field.name for field in fields(HoldRow) if field.name != "tokens_left"]
    query = select(*(hold[name] for name in names), tokens_left.label("tokens_left"))
    if not every_status:
        query = query.where(hold.status == "open")
    if user_id is not None:
        query = query.where(hold.user_id == user_id)
    rows = connection.execute(query.order_by(hold.id.desc()).limit(limit))
    return [HoldRow(**row) for row in rows.mappings()]


def _denied(row: Any, feature_name: str, estimated_tokens: int) -> TokensDenied:
    available = max(0, row.original - row.consumed - row.held)
    message = describe_denial(
        row.reason, feature_name=feature_name, estimated_tokens=estimated_tokens, available=available
    )
    payload = DenialPayload(
        success=False,
        error=message,
        error_code=row.reason,
        tokens_remaining=max(0, row.original - row.consumed),
        original_tokens=row.original,
        consumed_tokens=row.consumed,
        days_remaining=days_between(row.at, row.end_date),
    )
    return TokensDenied(payload)
