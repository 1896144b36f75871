"""Holds: tokens set aside for one running task, from before its work until after its last charge."""

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

    `tokens_left`: count still set aside. `attempt`: 1 for the first delivery, counted up by each later one; it fences
    an attempt that was overtaken. `reattached`: an earlier attempt had opened it. `replay`: an earlier attempt had done
    the task's work already, so this hold has no tokens and is for making the result again. `passed`: the reason code of
    a denial that the feature's mode let pass; None: it was admitted. `ordinals`: numbers of its calls, counted through
    however often the model client is given it: two calls of one number would be one charge.
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
    passed: str | None = None
    ordinals: Iterator[int] = field(default_factory=lambda: itertools.count(1), init=False, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class HoldRow:
    """A hold as it stands in the database, for people. `closed_at` None: it is open."""

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
    """Set `estimated_tokens` aside for a task, in one round trip, or give this attempt the hold its task has open.

    The locked balance row is the only gate: two callers can't both take the last tokens. For `lease_seconds` the hold
    is this attempt's alone; a later one may then take it over, or at once if its `retries` are higher: then this one
    has ended. After `ttl_seconds` without a sign of life the tokens are given back. A task whose body has returned
    gets a hold of no tokens, for what it has paid for already. `owner` is for people. `waits`: what the last
    `HoldBusyError` gave this message.
    `now`: None means the database's clock. Idempotent by task id.
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
        raise HoldBusyError(task_id, seconds, redundant=row.superfluous, waits=row.waits)
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
        passed=row.passed,
    )


_CLOSE = text(
    "SELECT trueup.close_hold(:user_id, :task_id, :attempt, :owner, :completed, CAST(:now AS timestamptz)) AS status"
)


def close_hold(
    connection: Connection, hold: Hold, *, completed: bool = False, now: datetime | None = None
) -> str | None:
    """Give back what the hold has left. Returns "settled", "released", or None when it was not this attempt's to close.

    Returns "open" when an earlier attempt may still be in a call: what that may cost stays held until it is charged, or
    until the hold's time runs out.
    `completed`: the task's body has returned, so that a redelivery need not buy anything. Idempotent: a hold ends once.
    `now`: None means the database's clock.
    """
    values = {"attempt": hold.attempt, "owner": None, "completed": completed, "now": now}
    return _close(connection, hold.user_id, hold.task_id, values)


def close_abandoned_hold(
    connection: Connection, user_id: UserId, task_id: str, *, owner: str, now: datetime | None = None
) -> str | None:
    """Give back what a task's hold has left, for a caller that knows its owner to be dead. Returns as `close_hold`.

    None too when the hold is another owner's by now: that one may be alive.
    """
    values = {"attempt": None, "owner": owner, "completed": False, "now": now}
    return _close(connection, user_id, task_id, values)


def _close(connection: Connection, user_id: UserId, task_id: str, values: dict[str, Any]) -> str | None:
    status: str | None = connection.execute(_CLOSE, {"user_id": user_id, "task_id": task_id, **values}).scalar_one()
    return status


_ABANDON = text("SELECT trueup.abandon_calls(:user_id, :task_id, :owner)")


def abandon_calls(connection: Connection, user_id: UserId, task_id: str, *, owner: str) -> None:
    """Note that the calls of a hold's owner are in flight no more, for a caller that knows it to be dead.

    The next attempt may then spend what they were given. Nothing, when the hold is another owner's by now.
    """
    connection.execute(_ABANDON, {"user_id": user_id, "task_id": task_id, "owner": owner})


def has_later_attempt(connection: Connection, hold: Hold) -> bool:
    """Return whether a later attempt of the hold's task was admitted: then this one is a duplicate that came second."""
    holds = own_table("hold", get_settings().host.user_id_type).c
    query = select(holds.id).where(
        holds.user_id == hold.user_id, holds.task_id == hold.task_id, holds.attempt > hold.attempt
    )
    return connection.scalar(select(query.exists())) or False


_EXPIRE = text("SELECT holds, tokens FROM trueup.expire_holds(:limit, CAST(:now AS timestamptz))")


def expire_holds(connection: Connection, *, limit: int = 1000, now: datetime | None = None) -> tuple[int, int]:
    """Take back holds whose owner died, those of at most `limit` at once. Returns how many, and their tokens."""
    row = connection.execute(_EXPIRE, {"limit": limit, "now": now}).one()
    return row.holds, row.tokens


def list_holds(
    connection: Connection,
    *,
    user_id: UserId | None = None,
    every_status: bool = False,
    limit: int = 100,
) -> list[HoldRow]:
    """Return holds, newest first: open ones, or those of `every_status`. `user_id` None: of all users."""
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
