"""Two sessions at one user's rows: who waits for whom, and are the books true however the first one ends?

The first session does its statement and keeps its transaction open; the second then either waits for it or does not.
Every pair of operations, both orders.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from tests.conftest import cloned_database
from tests.support.books import assert_true
from tests.support.host import NOW, Host
from tests.support.sessions import backend_pid, in_background
from tests.support.waiting import wait_for
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.errors import HoldOvertakenError, TokensDenied
from trueup.gate.holds import Hold, close_hold, expire_holds
from trueup.gate.provider_calls import begin_call, extend_hold
from trueup.stack import StackUrls

LATER = NOW + timedelta(hours=1)
BUDGET = 1_000
HELD = 400
LOGGED = 20
FREE = BUDGET - HELD - LOGGED


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A user with a hold of `HELD` tokens for task `t`, and a plan with twice the tokens to change to."""

    user: int
    hold: Hold
    bigger_plan: int


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`rows`: the rows it locks, in order. `row?`: skips the row if it is locked. `row!`: stops if it is locked."""

    act: Callable[[Connection, Scene], Any]
    rows: str = ""

    def waits_for(self, first: "Operation") -> bool:
        """Whether it waits while another has locked all its rows."""
        locked = {row.strip("?!") for row in first.rows.split()}
        for row in self.rows.split():
            if row.strip("?!") in locked and not row.endswith("?"):
                return not row.endswith("!")
        return False


def open_another(connection: Connection, scene: Scene) -> str:
    try:
        hold_tokens(connection, scene.user, FREE, now=NOW)
    except TokensDenied:
        return "denied"
    return "admitted"


def extend(connection: Connection, scene: Scene) -> str:
    with suppress(HoldOvertakenError):
        return "denied" if extend_hold(connection, scene.hold, FREE, now=NOW)[0] else "admitted"
    return "overtaken"


def begin(connection: Connection, scene: Scene) -> None:
    with suppress(HoldOvertakenError):
        begin_call(connection, scene.hold, call_key="1", max_tokens=10, lease_seconds=1, ttl_seconds=1, now=NOW)


def subscription(change: str) -> Callable[[Connection, Scene], Any]:
    statement = text(f"UPDATE billing_subscription SET {change} WHERE user_id = :user")
    values = {"user": 0, "start": NOW - timedelta(minutes=1), "plan": 0}

    def act(connection: Connection, scene: Scene) -> None:
        connection.execute(statement, values | {"user": scene.user, "plan": scene.bigger_plan})

    return act


def correct(connection: Connection, scene: Scene) -> None:
    connection.execute(
        text(
            "SELECT trueup.correct_counters(ARRAY[s.user_id], ARRAY[s.id::text], ARRAY[s.tokens_remaining::bigint], "
            "ARRAY[7::bigint]) FROM billing_subscription s WHERE s.user_id = :user"
        ),
        {"user": scene.user},
    ).all()


def refresh(connection: Connection, scene: Scene) -> None:
    connection.execute(
        text("SELECT trueup.refresh_balances(ARRAY[CAST(:user AS bigint)], :now)"), {"user": scene.user, "now": NOW}
    )


def log(connection: Connection, scene: Scene) -> None:
    connection.execute(
        text("INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) VALUES (:user, 'chat', 30, :now)"),
        {"user": scene.user, "now": NOW},
    )


def take_over(connection: Connection, scene: Scene) -> None:
    with suppress(TokensDenied):
        hold_tokens(connection, scene.user, 5, task="t", retries=1, now=NOW)


def charge(connection: Connection, scene: Scene) -> None:
    charge_tokens(connection, scene.hold, 50, now=NOW)


def close(connection: Connection, scene: Scene) -> None:
    close_hold(connection, scene.hold, now=NOW)


def expire(connection: Connection, scene: Scene) -> None:
    expire_holds(connection, now=LATER)


# A hold's row is locked after its balance, where both are; the subscription, which has the counter, comes last.
OPERATIONS = {
    "open another": Operation(act=open_another, rows="balance"),
    "take over": Operation(act=take_over, rows="balance hold"),
    "begin call": Operation(act=begin, rows="hold"),
    "extend": Operation(act=extend, rows="balance hold"),
    "charge": Operation(act=charge, rows="balance hold subscription?"),
    "close": Operation(act=close, rows="balance hold"),
    "expire": Operation(act=expire, rows="balance! hold"),
    "host logs": Operation(act=log),
    "renew": Operation(act=subscription("start_date = :start"), rows="subscription"),
    "change plan": Operation(act=subscription("token_plan_id = :plan"), rows="subscription"),
    "host decrements": Operation(act=subscription("tokens_remaining = tokens_remaining - 1"), rows="subscription"),
    "refresh": Operation(act=refresh, rows="balance!"),
    "correct": Operation(act=correct, rows="subscription?"),
}
ADMITTING = {"open another", "extend"}
PAIRS = list(itertools.product(OPERATIONS, repeat=2))


@pytest.fixture(scope="module")
def engine(stack: StackUrls, admin_engine: Engine, template_database: str) -> Iterator[Engine]:
    """A database for all races, each with a user of its own."""
    with cloned_database(stack, admin_engine, template_database) as url:
        engine = create_engine(url, connect_args={"options": "-c timezone=UTC"})
        yield engine
        engine.dispose()


@pytest.fixture(scope="module")
def host(engine: Engine) -> Iterator[Host]:
    with Host(engine) as host:
        yield host


@pytest.fixture
def scene(host: Host, engine: Engine) -> Scene:
    user = host.subscriber(BUDGET)
    with engine.begin() as connection:
        hold = hold_tokens(connection, user, HELD, task="t", now=NOW)
    host.log(user, LOGGED)  # a delta that waits to be folded
    return Scene(user=user, hold=hold, bigger_plan=host.plan(2 * BUDGET))


def waits(host: Host, second: int, first: int, done: Callable[[], bool]) -> bool:
    """Return whether the second session waits for the first, once it does or has ended."""
    blockers: list[int] = []

    def settled() -> bool:
        blockers[:] = host.value("SELECT pg_blocking_pids(:pid)", pid=second)
        return bool(blockers) or done()

    wait_for(settled, "the second session to end or to wait")
    assert set(blockers) <= {first}
    return bool(blockers)


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{first}, then {second}" for first, second in PAIRS])
def test_two_operations_at_once_leave_true_books(
    host: Host, engine: Engine, scene: Scene, first: str, second: str, committed: bool
) -> None:
    one, two = OPERATIONS[first], OPERATIONS[second]
    with in_background() as submit, engine.connect() as leader, engine.connect() as follower:
        answer = one.act(leader, scene)
        pids = backend_pid(follower), backend_pid(leader)
        following = submit(two.act, follower, scene)
        assert waits(host, *pids, following.done) == two.waits_for(one)
        leader.commit() if committed else leader.rollback()
        later_answer = following.result()
        follower.commit()
    assert_true(host)
    if first in ADMITTING:
        assert answer == "admitted"
    if {first, second} <= ADMITTING:
        assert later_answer == ("denied" if committed else "admitted")
    if "host logs" not in (first, second):
        with engine.connect() as connection:
            account = read_account(connection, scene.user, now=NOW)
        assert account.consumed + account.held <= account.original  # I2


def test_a_host_that_logs_usage_neither_waits_nor_is_waited_for() -> None:
    """This asserts the table above, so that a change of the table needs a reason."""
    logs = OPERATIONS["host logs"]
    assert not any(other.waits_for(logs) or logs.waits_for(other) for other in OPERATIONS.values())


def test_what_trueup_does_waits_for_no_lock_of_the_hosts_on_a_subscription() -> None:
    hosts = {"host logs", "renew", "change plan", "host decrements"}
    own = [operation for name, operation in OPERATIONS.items() if name not in hosts]
    assert not any(operation.waits_for(OPERATIONS[name]) for operation in own for name in hosts)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_waits_for_another_users(host: Host, engine: Engine, scene: Scene, name: str) -> None:
    with engine.connect() as leader, engine.connect() as follower:
        other = host.subscriber(BUDGET)
        theirs = Scene(
            user=other, hold=hold_tokens(follower, other, HELD, task="t", now=NOW), bigger_plan=scene.bigger_plan
        )
        follower.commit()
        for operation in OPERATIONS.values():
            if operation.act is not expire:  # it takes all users' overdue holds
                operation.act(leader, scene)
        follower.execute(text("SET LOCAL lock_timeout = '2s'"))
        OPERATIONS[name].act(follower, theirs)
        leader.rollback()
        follower.rollback()
    assert_true(host)


def test_the_sweep_waits_for_a_call_that_begins_and_then_leaves_its_hold_alone(
    host: Host, engine: Engine, scene: Scene
) -> None:
    with in_background() as submit, engine.connect() as leader, engine.connect() as follower:
        begin_call(leader, scene.hold, call_key="1", max_tokens=10, lease_seconds=1, ttl_seconds=60, now=LATER)
        pids = backend_pid(follower), backend_pid(leader)
        sweeping = submit(expire_holds, follower, now=LATER)
        assert waits(host, *pids, sweeping.done)
        leader.commit()
        sweeping.result()
        follower.commit()
    assert balance(host, scene.user) == (0, HELD)
    assert host.value("SELECT status FROM trueup.hold WHERE user_id = :user", user=scene.user) == "open"
    assert_true(host)
