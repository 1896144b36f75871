"""Provider calls: a call intent is recorded before each call, and stays as evidence until its cost is known."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_estimate
from trueup.database.calls import call
from trueup.errors import HoldOvertakenError
from trueup.settings.settings import get_settings

if TYPE_CHECKING:
    from trueup.gate.holds import Hold


@dataclass(frozen=True, kw_only=True)
class UnrecordedCall:
    """A call that began and was never charged: its task's hold has ended, or the provider gave no clear answer.

    The provider may have billed it. `tokens_bound`: its maximum cost, a count.
    """

    user_id: UserId
    task_id: str
    call_key: str
    tokens_bound: int
    started_at: datetime


_BEGIN = text(
    """
    SELECT granted, overtaken, tokens_left
    FROM trueup.begin_call(:user_id, :task_id, :attempt, :call_key, :bound, make_interval(secs => :lease_seconds),
                           make_interval(secs => :ttl_seconds), CAST(:now AS timestamptz))
    """
)


def begin_call(
    connection: Connection,
    hold: "Hold",
    *,
    call_key: str,
    max_tokens: int,
    lease_seconds: float,
    ttl_seconds: float,
    now: datetime | None = None,
) -> int | None:
    """Record a call intent, if the hold covers the call; renew the lease and the hold.

    `max_tokens`: the call's maximum cost, a count. `lease_seconds`, `ttl_seconds`: as in `open_hold`. `now`: None means
    the database's clock. Returns None if the call may start; else the tokens that the hold has left for it, without
    those of other calls in flight. Raises `HoldOvertakenError` if the hold has ended or belongs to a later attempt.
    """
    [row] = call(
        connection,
        _BEGIN,
        {
            "user_id": hold.user_id,
            "task_id": hold.task_id,
            "attempt": hold.attempt,
            "call_key": call_key,
            "bound": max_tokens,
            "lease_seconds": lease_seconds,
            "ttl_seconds": ttl_seconds,
            "now": now,
        },
    )
    if row.overtaken:
        raise HoldOvertakenError(hold.task_id, hold.attempt)
    return None if row.granted else row.tokens_left


_END = text("SELECT trueup.end_call(:user_id, :task_id, :attempt, :call_key, :unknown)")


def end_call(connection: Connection, hold: "Hold", *, call_key: str, unknown: bool) -> None:
    """Record that a call ended without usage. `unknown`: it may have been billed, so its intent is kept as evidence."""
    call(
        connection,
        _END,
        {
            "user_id": hold.user_id,
            "task_id": hold.task_id,
            "attempt": hold.attempt,
            "call_key": call_key,
            "unknown": unknown,
        },
    )


_EXTEND = text(
    """
    SELECT overtaken, reason, tokens_left
    FROM trueup.extend_hold(:user_id, :task_id, :attempt, :feature_name, :tokens, :mode, CAST(:now AS timestamptz))
    """
)


def extend_hold(
    connection: Connection, hold: "Hold", tokens: int, *, now: datetime | None = None
) -> tuple[str | None, int]:
    """Add `tokens` (a count) to an open hold, by the same decision as at the gate.

    `now`: None means the database's clock. Returns the reason code of a denial (None: the tokens were added), and the
    count of tokens that the hold has left. Raises `HoldOvertakenError` if the hold has ended or belongs to a later
    attempt, `InvalidInputError` for a malformed count.
    """
    [row] = call(
        connection,
        _EXTEND,
        {
            "user_id": hold.user_id,
            "task_id": hold.task_id,
            "attempt": hold.attempt,
            "feature_name": hold.feature_name,
            "tokens": check_estimate(tokens, "tokens"),
            "mode": get_settings().gate.mode_of(hold.feature_name),
            "now": now,
        },
    )
    if row.overtaken:
        raise HoldOvertakenError(hold.task_id, hold.attempt)
    return row.reason, row.tokens_left


# For a row `c` of trueup.call_intent. A call in flight, whose hold is open, is not yet unrecorded.
IS_UNRECORDED = """(c.outcome = 'unknown' OR NOT EXISTS (
    SELECT FROM trueup.hold h WHERE h.user_id = c.user_id AND h.task_id = c.task_id AND h.status = 'open'))"""

_LIST_UNRECORDED = text(
    f"""
    SELECT c.user_id, c.task_id, c.call_key, c.tokens_bound, c.started_at
    FROM trueup.call_intent c WHERE {IS_UNRECORDED} ORDER BY c.started_at DESC LIMIT :limit
    """
)


def list_unrecorded_calls(connection: Connection, *, limit: int = 100) -> list[UnrecordedCall]:
    """Return calls that may have been billed and were never charged, newest first, at most `limit`.

    Calls in flight, whose hold is open, are not included.
    """
    return [UnrecordedCall(**row) for row in connection.execute(_LIST_UNRECORDED, {"limit": limit}).mappings()]
