"""What is done for one task of one user leaves all other tasks and users alone."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import NOW, Host, after
from tests.support.work import OWNER, charge_tokens, hold_tokens
from trueup.errors import HoldBusyError
from trueup.gate.holds import Hold, abandon_calls, close_abandoned_hold, close_hold, expire_holds, keep_holds
from trueup.gate.provider_calls import begin_call, end_call, extend_hold

LEASE = 30
TTL = 600
# Which rows belong to the open hold of the user's task `t`: the holds of its attempts 1 and 2 have ended. A balance, a
# counter and the log belong to all tasks of the user.
HOLD_ROW = "user_id = :user AND task_id = 't' AND attempt > 2"
ROWS = {
    "trueup.hold": HOLD_ROW,
    "trueup.call_intent": HOLD_ROW,
    "trueup.charge": HOLD_ROW,
    "trueup.balance": "user_id = :user",
    "billing_subscription": "user_id = :user",
    "ai_usage_log": "user_id = :user",
}


def begin(connection: Connection, hold: Hold, key: str, bound: int = 100, seconds: float = 0) -> None:
    times = {"lease_seconds": LEASE, "ttl_seconds": TTL, "now": after(seconds)}
    assert begin_call(connection, hold, call_key=key, max_tokens=bound, **times) is None


def deliver(
    connection: Connection,
    user: int,
    task: str,
    *,
    tokens: int = 600,
    ttl: int = TTL,
    seconds: float = 0,
    request: str = "",
) -> Hold:
    return hold_tokens(connection, user, tokens, task=task, lease=LEASE, ttl=ttl, request=request, now=after(seconds))


def in_two_calls(connection: Connection, user: int, task: str, ttl: int, tokens: int = 600) -> Hold:
    """Open a hold, charge its call `0`, and begin its calls `1` and `2`. Earlier holds of two requests have ended."""
    for number, request in enumerate(["another", ""]):
        ended = deliver(connection, user, task, request=request)
        charge_tokens(connection, ended, 10, key=f"ended {number}", now=NOW)
        begin(connection, ended, "1")
        close_hold(connection, ended, now=NOW)
    hold = deliver(connection, user, task, ttl=ttl, tokens=tokens)
    charge_tokens(connection, hold, 10, key="0", now=NOW, answer={"text": task})
    begin(connection, hold, "1")
    begin(connection, hold, "2")
    return hold


def take_over(connection: Connection, hold: Hold) -> Hold:
    later = deliver(connection, hold.user_id, "t", seconds=LEASE)
    assert later.tokens_left == 590  # the tokens in calls are withheld, and as many are added
    return later


def duplicate(connection: Connection, hold: Hold) -> None:
    with suppress(HoldBusyError):
        deliver(connection, hold.user_id, "t")


def keep(connection: Connection, hold: Hold) -> None:
    seconds = {"lease_seconds": LEASE, "ttl_seconds": TTL, "max_seconds": 3_600}
    assert keep_holds(connection, [hold], now=after(LEASE / 2), **seconds) == 1


def close_beside_a_slow_attempt(connection: Connection, hold: Hold) -> None:
    assert close_hold(connection, take_over(connection, hold), now=after(LEASE)) == "open"


def charge_the_last_slow_call(connection: Connection, hold: Hold) -> None:
    close_beside_a_slow_attempt(connection, hold)
    for key in ("1", "2"):
        assert charge_tokens(connection, hold, 60, key=key, now=after(LEASE)).late


def charge_after_the_end(connection: Connection, hold: Hold) -> None:
    close_hold(connection, hold, now=NOW)
    assert charge_tokens(connection, hold, 60, now=NOW).tokens_over == 60


def begin_anew(connection: Connection, hold: Hold) -> None:
    close_hold(connection, hold, now=NOW)
    assert deliver(connection, hold.user_id, "t").tokens_left == 600


OPERATIONS: dict[str, Callable[[Connection, Hold], Any]] = {
    "a call begins": lambda connection, hold: begin(connection, hold, "3"),
    "a call begins again": lambda connection, hold: begin(connection, hold, "1", 50),
    "a call ends without cost": lambda connection, hold: end_call(connection, hold, call_key="1", unknown=False),
    "a call ends unknown": lambda connection, hold: end_call(connection, hold, call_key="1", unknown=True),
    "its hold is extended": lambda connection, hold: extend_hold(connection, hold, 50, now=NOW),
    "a call is charged": lambda connection, hold: charge_tokens(connection, hold, 60, now=NOW),
    "its last call is charged": lambda connection, hold: charge_tokens(connection, hold, 60, now=NOW, last=True),
    "more than its hold is charged": lambda connection, hold: charge_tokens(connection, hold, 700, now=NOW),
    "it is charged after its end": charge_after_the_end,
    "its heartbeat": keep,
    "a duplicate comes": duplicate,
    "another attempt takes over": take_over,
    "its hold is closed": lambda connection, hold: close_hold(connection, hold, completed=True, now=NOW),
    "its hold is closed beside a slow attempt": close_beside_a_slow_attempt,
    "the slow attempt's calls are charged": charge_the_last_slow_call,
    "its process dies": lambda connection, hold: abandon_calls(connection, hold.user_id, "t", owner=OWNER),
    "its dead owner's hold is closed": lambda connection, hold: close_abandoned_hold(
        connection, hold.user_id, "t", owner=OWNER, now=NOW
    ),
    "its hold ends overdue": lambda connection, hold: expire_holds(connection, now=after(TTL)),
    "its kept calls end overdue too": lambda connection, hold: [
        expire_holds(connection, now=after(TTL * times)) for times in (1, 2)
    ],
    "it is delivered after its end": begin_anew,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_on_one_task_leaves_other_tasks_and_users_alone(
    host: Host, connection: Connection, operation: Callable[[Connection, Hold], Any]
) -> None:
    other, user = host.subscriber(10_000), host.subscriber(10_000)
    for number, (owner, task) in enumerate([(user, "u"), (other, "t"), (other, "u")]):
        in_two_calls(connection, owner, task, ttl=100_000, tokens=700 + number)
    # Other tasks in two attempts, so that there are calls of each attempt number beside those of the task.
    assert in_two_calls(connection, user, "v", ttl=100_000).attempt == 3
    for owner, task in ((user, "v"), (other, "t")):
        begin(connection, deliver(connection, owner, task, ttl=100_000, seconds=LEASE), "1", seconds=LEASE)
    hold = in_two_calls(connection, user, "t", ttl=TTL)

    def rows(which: str) -> list[Any]:
        conditions = {table: which.format(own) for table, own in ROWS.items()}
        return [
            sorted(map(str, host.execute(f"SELECT * FROM {table} WHERE {condition}", user=user)))
            for table, condition in conditions.items()
        ]

    own, others = rows("{}"), rows("NOT ({})")
    operation(connection, hold)
    assert rows("NOT ({})") == others
    assert rows("{}") != own
    assert_true(host)
