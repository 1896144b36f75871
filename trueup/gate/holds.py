"""Holds: tokens set aside for one running task, from the gate until its last charge. holds.sql decides about them.

A hold expires when no heartbeat renews it; `expire_holds`, run each minute, frees its tokens. The most that its calls
in flight may cost stays held for a second period.
"""

import heapq
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from psycopg.errors import UniqueViolation
from sqlalchemy import Connection, case, select, text
from sqlalchemy.exc import IntegrityError

from trueup.accounts.account import days_between
from trueup.accounts.subscriptions import refuse_several_subscriptions
from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_estimate
from trueup.database.calls import UnreadableAnswerError, call
from trueup.database.schema import own_table
from trueup.database.schema.holds import ONE_OPEN_PER_TASK
from trueup.errors import HoldBusyError, TaskIdReusedError, TokensDenied
from trueup.gate.denial import Access, denial_payload, describe_denial
from trueup.host.sections import require_section
from trueup.settings.settings import get_settings
from trueup.telemetry import span


class CallNumbers:
    """The numbers of a hold's provider calls: for each fingerprint, its calls are 1, 2, 3, …

    A call's key has its fingerprint and this number, so the order of different calls does not matter: a body that calls
    from several threads finds after a redelivery what it has paid for, whatever thread comes first. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()
        self._free: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, fingerprint: str) -> int:
        """Return the lowest number that no call of this fingerprint has."""
        with self._lock:
            if self._free[fingerprint]:
                return heapq.heappop(self._free[fingerprint])
            self._taken[fingerprint] += 1
            return self._taken[fingerprint]

    def give_back(self, fingerprint: str, number: int) -> None:
        """Free the number of a call that certainly was not billed. The next call of this fingerprint takes it."""
        with self._lock:
            heapq.heappush(self._free[fingerprint], number)


@dataclass(frozen=True, kw_only=True)
class Hold:
    """An open hold, as one attempt of its task sees it.

    `tokens_left`: count still set aside.
    `attempt`: 1 for the first delivery, one more for each later one. It fences earlier attempts.
    `reattached`: an earlier attempt opened the hold.
    `replay`: an earlier attempt completed the task's work. The hold has no tokens; charged calls are replayed.
    `overridden`: the reason code of a denial that the feature's mode overrode. None: the gate admitted the task.
    `request`: the fingerprint of the task's first request. `fresh_retries`: how often its body asked for new answers.
    `retries`: the retries that its message counts. `follows`: the last hold of this id was another request's.
    `calls`: the numbers of the hold's calls, shared by all model clients of the hold. Two calls with the same key would
    be one charge.
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
    request: str = ""
    fresh_retries: int = 0
    retries: int = 0
    follows: bool = False
    calls: CallNumbers = field(default_factory=CallNumbers, init=False, repr=False, compare=False)

    @property
    def scope(self) -> str:
        """The scope of the hold's calls: a call is answered only from a charge of the same scope."""
        return f"{self.request}.{self.fresh_retries}"


@dataclass(frozen=True, kw_only=True)
class HoldRow:
    """A row of the table of holds, for display. Tokens are counts; `tokens_left`: still set aside.

    `calls`: charged so far, with `tokens_charged`. `closed_at` None: the hold is open.
    """

    user_id: UserId
    task_id: str
    feature_name: str
    status: str
    attempt: int
    owner: str
    tokens_reserved: int
    tokens_charged: int
    tokens_left: int
    calls: int
    opened_at: datetime
    expires_at: datetime
    closed_at: datetime | None


_OPEN = text(
    """
    SELECT * FROM trueup.open_hold(:user_id, :task_id, :request, :fresh_retries, :retries, :feature_name, :section,
                                   :owner, :tokens, make_interval(secs => :lease_seconds),
                                   make_interval(secs => :ttl_seconds), :waits, :mode, CAST(:now AS timestamptz))
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
    request: str = "",
    fresh_retries: int = 0,
    retries: int = 0,
    waits: int = 0,
    now: datetime | None = None,
) -> Hold:
    """Reserve tokens for a task in one round trip, or return the open hold of the task to its next attempt.

    Idempotent by task id and request. The locked balance row decides: two callers can't both take the last tokens. A
    task whose body has returned gets a hold without tokens, to replay the calls that it has paid for.

    `estimated_tokens`: count to reserve. `owner`: names the process, for display.
    `lease_seconds`: the time during which no later attempt can take the hold over, unless its `retries` are higher,
    which proves that this attempt has ended. `ttl_seconds`: the hold expires after this time without a heartbeat.
    `request`: the fingerprint of what the task is asked to do. `fresh_retries`: how often its body has asked for new
    answers. `waits`: the number that the last `HoldBusyError` gave to this message. `now`: None means the database's
    clock.
    Raises `TokensDenied` with the specification's payload, `HoldBusyError` while another attempt has the hold,
    `TaskIdReusedError` while another request with this id has one, `InvalidInputError` for a malformed estimate
    and for a section that the host's log refuses, `SeveralSubscriptionsError`.
    """
    row = _traced_open(
        connection,
        {
            "user_id": user_id,
            "task_id": task_id,
            "request": request,
            "fresh_retries": fresh_retries,
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
    _refuse_in_use(row, task_id)
    if row.reason is not None:
        raise _denied(connection, row, user_id, feature_name, estimated_tokens)
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
        request=request,
        fresh_retries=row.fresh,
        retries=retries,
        follows=row.follows,
    )


def _traced_open(connection: Connection, values: dict[str, Any]) -> Any:
    about = {"trueup.feature": values["feature_name"], "trueup.task_id": values["task_id"]}
    with span("trueup.gate", {**about, "trueup.tokens.estimated": values["tokens"]}) as traced:
        row = _execute_open(connection, values)
        in_use = "in_use" if row.reused or row.busy_until is not None else "admitted"
        traced.set({"trueup.gate.outcome": row.reason or in_use})
    return row


def _execute_open(connection: Connection, values: dict[str, Any]) -> Any:
    require_section(connection, get_settings().host, values["section"])
    try:
        [row] = call(connection, _OPEN, values)
    except IntegrityError as error:
        if isinstance(error.orig, UniqueViolation) and error.orig.diag.constraint_name == ONE_OPEN_PER_TASK:
            raise TaskIdReusedError(values["task_id"]) from error  # another user's task has the id now
        raise
    except UnreadableAnswerError:
        # The hold is committed, and this caller never learns of it. Its tokens would be held until it expires.
        close_abandoned_hold(connection, values["user_id"], values["task_id"], owner=values["owner"], now=values["now"])
        raise
    return row


def _refuse_in_use(row: Any, task_id: str) -> None:
    if row.reused:
        raise TaskIdReusedError(task_id)
    if row.busy_until is not None:
        seconds = (row.busy_until - row.at).total_seconds()
        raise HoldBusyError(task_id, seconds, redundant=row.redundant, waits=row.waits)


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
    [row] = call(connection, _CLOSE, {"user_id": user_id, "task_id": task_id, **values})
    status: str | None = row.status
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


_KEEP = text(
    """
    SELECT trueup.keep_holds(CAST(:holds AS jsonb), make_interval(secs => :lease_seconds),
                             make_interval(secs => :ttl_seconds), make_interval(secs => :max_seconds),
                             CAST(:now AS timestamptz))
    """
)


def keep_holds(
    connection: Connection,
    holds: Iterable[Hold],
    *,
    lease_seconds: float,
    ttl_seconds: float,
    max_seconds: float,
    now: datetime | None = None,
) -> int:
    """Renew the leases and the expiry of open holds whose attempts are alive. Returns how many were renewed.

    Leaves these alone: a hold that has ended, that belongs to a later attempt, that was opened more than `max_seconds`
    ago, or whose row is locked now. `now`: None means the database's clock.
    """
    own = [{"user_id": str(hold.user_id), "task_id": hold.task_id, "attempt": hold.attempt} for hold in holds]
    values = {"lease_seconds": lease_seconds, "ttl_seconds": ttl_seconds, "max_seconds": max_seconds, "now": now}
    kept: int = connection.execute(_KEEP, {"holds": json.dumps(own), **values}).scalar_one()
    return kept


_LOST = text(
    """
    SELECT coalesce(sum(t.attempts - 1 + CAST(t.status = 'expired' AS integer)), 0) FROM (
        SELECT h.request, h.status, h.attempt - coalesce(lag(h.attempt) OVER (ORDER BY h.id), 0) AS attempts
        FROM trueup.hold h WHERE h.user_id = :user_id AND h.task_id = :task_id
    ) t WHERE t.request = :request
    """
)


def count_lost(connection: Connection, hold: Hold) -> int:
    """Return how many attempts of the hold's request have lost their hold: it expired, or a later attempt took it over.

    A retry takes over a hold that it has kept, so it counts too.
    """
    place = {"user_id": hold.user_id, "task_id": hold.task_id, "request": hold.request}
    return int(connection.execute(_LOST, place).scalar_one())


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
    oldest_first: bool = False,
    limit: int = 100,
) -> list[HoldRow]:
    """Return at most `limit` open holds, newest first unless `oldest_first`; with `every_status` also ended ones.

    `user_id` None: holds of all users.
    """
    hold = own_table("hold", get_settings().host.user_id_type).c
    tokens_left = case((hold.status == "open", hold.tokens_reserved - hold.tokens_covered), else_=0)
    names = [field.name for field in fields(HoldRow) if field.name != "tokens_left"]
    query = select(*(hold[name] for name in names), tokens_left.label("tokens_left"))
    if not every_status:
        query = query.where(hold.status == "open")
    if user_id is not None:
        query = query.where(hold.user_id == user_id)
    # Few holds are open: by their index, and never along the ids of all ended ones.
    order = (hold.opened_at, hold.id) if oldest_first else (hold.id.desc(),)
    rows = connection.execute(query.order_by(*order).limit(limit))
    return [HoldRow(**row) for row in rows.mappings()]


def _denied(
    connection: Connection, row: Any, user_id: UserId, feature_name: str, estimated_tokens: int
) -> TokensDenied:
    """Return the denial. Raises `SeveralSubscriptionsError` if the user has several subscriptions."""
    if row.reason == "subscription_deactivated":
        refuse_several_subscriptions(connection, user_id)
    available = max(0, row.original - row.consumed - row.held)
    message = describe_denial(
        row.reason, feature_name=feature_name, estimated_tokens=estimated_tokens, available=available
    )
    access = Access(
        has_access=False,
        reason=row.reason,
        message=message,
        tokens_remaining=max(0, row.original - row.consumed),
        original_tokens=row.original,
        consumed_tokens=row.consumed,
        days_remaining=days_between(row.at, row.end_date),
        tokens_held=row.held,
        tokens_available=available,
    )
    return TokensDenied(denial_payload(access))
