from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import QueuePool

from tests.support.books import assert_true
from tests.support.host import NOW, Host
from tests.support.sessions import (
    backend_pid,
    in_background,
    locked_balance,
    run_at_once,
    wait_for_lock,
)
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.database.calls import UnreadableAnswerError
from trueup.errors import HoldBusyError, InvalidInputError, TokensDenied
from trueup.gate.decision import check_access
from trueup.gate.holds import Hold, close_hold, expire_holds, list_holds
from trueup.gate.provider_calls import begin_call

pytestmark = pytest.mark.dated

LATER = NOW + timedelta(hours=1)


def grant(host: Host, user: int) -> None:
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, granted_at, reason, granted_by) "
        "VALUES (:user, 100, now(), '', 'test')",
        user=user,
    )


def empty_the_log_twice(host: Host, user: int, connection: Connection) -> None:
    host.execute("TRUNCATE ai_usage_log")
    close_hold(connection, hold_tokens(connection, user, 10, now=NOW), now=NOW)
    host.execute("TRUNCATE ai_usage_log")


def statuses(host: Host) -> list[str]:
    return list(host.execute("SELECT status FROM trueup.hold ORDER BY id").scalars())


def test_a_hold_whose_answer_cannot_be_read_is_given_back(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    # Python has no time after the year 9999, in which this hold would expire.
    with pytest.raises(UnreadableAnswerError, match="year"):
        hold_tokens(connection, user, 900, task="t", now=datetime(9999, 12, 31, 23, 59, tzinfo=UTC))
    assert balance(host, user) == (0, 0)
    assert statuses(host) == ["released"]


def test_of_32_gates_at_once_exactly_as_many_are_admitted_as_the_budget_covers(host: Host, database: str) -> None:
    user = host.subscriber(10_999)
    host.log(user, 500)
    engine = create_engine(database, poolclass=QueuePool, pool_size=32, isolation_level="AUTOCOMMIT")

    def gate(number: int) -> str:
        with engine.connect() as connection:
            try:
                hold_tokens(connection, user, 1_000, task=f"t{number}")
            except TokensDenied as denied:
                return denied.error_code
            return "admitted"

    answers = run_at_once([lambda number=number: gate(number) for number in range(32)])
    engine.dispose()
    assert (answers.count("admitted"), answers.count("insufficient_tokens")) == (10, 22)
    assert balance(host, user) == (500, 10_000)
    assert_true(host)


def test_a_gate_that_waited_decides_on_the_data_committed_during_the_wait(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 0)
    pid = backend_pid(connection)
    with in_background() as submit:
        with locked_balance(host, user):
            waiting = submit(hold_tokens, connection, user, 1_000)
            wait_for_lock(host, pid)
            host.log(user, 1)
        with pytest.raises(TokensDenied) as denied:
            waiting.result()
    assert denied.value.payload["consumed_tokens"] == 1
    assert_true(host)


def test_a_gate_that_waited_sees_a_subscription_deactivated_meanwhile(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 0)
    pid = backend_pid(connection)
    with in_background() as submit:
        with locked_balance(host, user):
            waiting = submit(hold_tokens, connection, user, 1_000)
            wait_for_lock(host, pid)
            host.execute("UPDATE billing_subscription SET is_active = false")
        with pytest.raises(TokensDenied) as denied:
            waiting.result()
    assert denied.value.error_code == "subscription_deactivated"


def test_a_rebuild_sees_a_row_of_the_host_and_its_delta_or_neither(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    pid = backend_pid(connection)
    with in_background() as submit, host.engine.connect() as session:
        session.execute(text("LOCK TABLE ai_usage_log IN ACCESS EXCLUSIVE MODE"))
        waiting = submit(hold_tokens, connection, user, 100)
        wait_for_lock(host, pid)
        session.execute(
            text("INSERT INTO ai_usage_log (user_id, section, total_tokens) VALUES (:u, 'x', 7)"), {"u": user}
        )
        session.commit()
        waiting.result()
    assert_true(host)


def test_several_concurrent_first_gates_of_a_user_create_one_balance(host: Host, database: str) -> None:
    user = host.subscriber(1_000)
    host.log(user, 10)
    engine = create_engine(database, poolclass=QueuePool, pool_size=8, isolation_level="AUTOCOMMIT")

    def gate() -> Hold:
        with engine.connect() as connection:
            return hold_tokens(connection, user, 100)

    run_at_once([gate] * 8)
    engine.dispose()
    assert balance(host, user) == (10, 800)
    assert_true(host)


def test_a_denied_task_leaves_no_hold(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 1_001)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, host.user(), 1)
    assert statuses(host) == []
    assert balance(host, user) == (0, 0)


def test_an_estimate_of_zero_is_admitted_and_holds_nothing(host: Host, connection: Connection) -> None:
    user = host.subscriber(10)
    assert hold_tokens(connection, user, 0).tokens_left == 0
    assert_true(host)


def test_an_estimate_of_zero_is_denied_once_all_tokens_are_used(host: Host, connection: Connection) -> None:
    user = host.subscriber(100)
    charge_tokens(connection, hold_tokens(connection, user, 100), 100)
    with pytest.raises(TokensDenied) as denied:
        hold_tokens(connection, user, 0)
    assert denied.value.error_code == "no_tokens_remaining"


@pytest.mark.parametrize("estimate", [-1, True, 1.0, "5"])
def test_a_malformed_estimate_is_refused_before_anything_is_written(
    host: Host, connection: Connection, estimate: object
) -> None:
    user = host.subscriber(10)
    with pytest.raises(InvalidInputError):
        hold_tokens(connection, user, estimate)  # type: ignore[arg-type]
    assert host.value("SELECT count(*) FROM trueup.balance") == 0


def test_a_redelivered_task_gets_its_open_hold_back_as_the_next_attempt(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    first = hold_tokens(connection, user, 900, task="t", now=NOW)
    charge_tokens(connection, first, 300, now=NOW)
    second = hold_tokens(connection, user, 900, task="t", now=NOW + timedelta(seconds=9))
    assert (first.attempt, first.reattached, second.attempt, second.reattached) == (1, False, 2, True)
    assert second.tokens_left == 600
    assert second.expires_at - first.expires_at == timedelta(seconds=9)
    assert statuses(host) == ["open"]
    assert_true(host)


def test_a_duplicate_of_a_retry_waits_for_that_retry(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    for retries in (0, 1):
        hold_tokens(connection, user, 500, task="t", lease=30, retries=retries, now=NOW)
    with pytest.raises(HoldBusyError):
        hold_tokens(connection, user, 500, task="t", lease=30, retries=1, now=NOW)


def test_a_redelivered_task_keeps_its_hold_when_the_budget_is_spent_by_then(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 900, task="t")
    host.log(user, 5_000)
    host.execute("UPDATE billing_subscription SET is_active = false")
    assert hold_tokens(connection, user, 900, task="t").reattached


def test_a_task_that_comes_back_after_its_hold_ended_passes_the_gate_again(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    close_hold(connection, hold_tokens(connection, user, 900, task="t"))
    again = hold_tokens(connection, user, 900, task="t")
    assert (again.attempt, again.reattached) == (2, False)
    close_hold(connection, again)
    host.log(user, 200)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 900, task="t")
    assert_true(host)


@pytest.mark.parametrize("now", [NOW, None], ids=["injected clock", "clock of the database"])
def test_a_new_task_and_its_charge_take_the_short_way_up_to_the_last_token_and_moment(
    host: Host, connection: Connection, now: datetime | None
) -> None:
    """The functions for all other cases would give the same answers, with many more statements under the lock."""
    other, user = host.subscriber(1_000), host.subscriber(1_000, end=now)
    for owner, task in ((other, "t"), (user, "u")):
        beside = hold_tokens(connection, owner, 100, task=task, now=now)
        charge_tokens(connection, beside, 10, now=now)
        begin_call(connection, beside, call_key="2", max_tokens=50, lease_seconds=30, ttl_seconds=600, now=now)
        ended = hold_tokens(connection, owner, 100, ttl=0, now=now)
        if owner == user:
            close_hold(connection, ended, now=now)
    host.log(other, 10)
    grant(host, other)
    host.execute("UPDATE billing_tokenplan SET tokens_included = 0 WHERE id = (SELECT min(id) FROM billing_tokenplan)")
    with host.engine.begin() as session:
        session.execute(text("SET LOCAL track_functions = 'all'"))
        hold = hold_tokens(session, user, 900, task="t", now=now)
        charge = charge_tokens(session, hold, 900, last=True, now=now)
        called = set(session.scalars(text("SELECT funcname FROM pg_stat_xact_user_functions")))
    assert (charge.closed, balance(host, user)) == (True, (910, 90))
    assert {"open_hold", "record_charge"} <= called
    assert not called & {"open_other_hold", "record_other_charge"}


@pytest.mark.parametrize(
    "change",
    [
        lambda host, user, _: host.log(user, 10),
        lambda host, user, _: grant(host, user),
        lambda host, *_: host.execute("UPDATE billing_subscription SET start_date = :at", at=NOW),
        lambda host, *_: host.execute("TRUNCATE ai_usage_log"),
        empty_the_log_twice,
        lambda _, user, connection: hold_tokens(connection, user, 10, ttl=60, now=NOW),
        lambda _, user, connection: close_hold(connection, hold_tokens(connection, user, 10, task="t", now=NOW)),
    ],
    ids=[
        "a host's row",
        "a grant",
        "a new window",
        "an empty log",
        "a log emptied again",
        "an overdue hold",
        "an earlier hold of the task",
    ],
)
def test_a_task_takes_the_long_way_if_the_balance_may_be_out_of_date(
    host: Host, connection: Connection, change: Callable[[Host, int, Connection], Any]
) -> None:
    user = host.subscriber(1_000)
    close_hold(connection, hold_tokens(connection, user, 100, now=NOW), now=NOW)
    change(host, user, connection)
    with host.engine.begin() as session:
        session.execute(text("SET LOCAL track_functions = 'all'"))
        hold_tokens(session, user, 10, task="t", now=NOW + timedelta(seconds=60))
        called = set(session.scalars(text("SELECT funcname FROM pg_stat_xact_user_functions")))
    assert "open_other_hold" in called
    assert balance(host, user) == (host.used(user), 10)
    assert_true(host)


def test_two_users_may_run_tasks_of_the_same_id(host: Host, connection: Connection) -> None:
    users = [host.subscriber(1_000), host.subscriber(1_000)]
    assert [hold_tokens(connection, user, 900, task="t").attempt for user in users] == [1, 1]
    assert_true(host)


def test_closing_a_hold_releases_its_remaining_tokens_once(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    unused, used = hold_tokens(connection, user, 300), hold_tokens(connection, user, 400)
    charge_tokens(connection, used, 150)
    assert close_hold(connection, unused) == "released"
    assert close_hold(connection, used) == "settled"
    assert [close_hold(connection, hold) for hold in (unused, used)] == [None, None]
    assert balance(host, user) == (150, 0)
    assert statuses(host) == ["released", "settled"]
    assert_true(host)


def test_after_the_close_of_a_hold_the_session_waits_for_the_disk_again(host: Host, connection: Connection) -> None:
    close_hold(connection, hold_tokens(connection, host.subscriber(), 100))
    assert connection.scalar(text("SHOW synchronous_commit")) == "on"


def test_an_overtaken_attempt_cant_close(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    first = hold_tokens(connection, user, 300, task="t")
    second = hold_tokens(connection, user, 300, task="t")
    assert close_hold(connection, first) is None
    assert balance(host, user) == (0, 300)
    assert close_hold(connection, second) == "released"


def test_of_several_concurrent_closings_one_releases_the_tokens(
    host: Host, connection: Connection, database: str
) -> None:
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 300)
    hold_tokens(connection, user, 500)
    engine = create_engine(database, poolclass=QueuePool, pool_size=8, isolation_level="AUTOCOMMIT")

    def close() -> str | None:
        with engine.connect() as own:
            return close_hold(own, hold)

    assert sorted(map(str, run_at_once([close] * 8))) == ["None"] * 7 + ["released"]
    engine.dispose()
    assert balance(host, user) == (0, 500)


@pytest.mark.parametrize("logged", [0, 100])
def test_a_hold_counts_the_retries_for_new_answers_that_its_body_has_asked_for(
    host: Host, connection: Connection, logged: int
) -> None:
    user = host.subscriber(1_000)
    for retries in (0, 1):
        if logged:  # a delta, which the gate of the common case leaves to the general one
            host.log(user, logged)
        assert hold_tokens(connection, user, 100, fresh_retries=retries).fresh_retries == retries


@pytest.mark.parametrize(
    "refuse",
    [
        "ALTER TABLE trueup.hold ADD CHECK (task_id <> 'second')",
        "CREATE UNIQUE INDEX ON trueup.hold (feature_name)",
    ],
)
def test_an_error_of_the_database_is_no_reuse_of_the_id(host: Host, connection: Connection, refuse: str) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 100, task="first")
    host.execute(refuse)
    with pytest.raises(IntegrityError):
        hold_tokens(connection, user, 100, task="second")
    assert balance(host, user) == (0, 100)
    assert_true(host)


def test_the_next_gate_ends_overdue_holds(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    dead = hold_tokens(connection, user, 1_000, ttl=60, now=NOW)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 1, now=NOW + timedelta(seconds=59))
    assert check_access(connection, user, 1_000, "Test", now=NOW + timedelta(seconds=60))["has_access"]
    hold_tokens(connection, user, 1_000, now=NOW + timedelta(seconds=60))
    assert statuses(host) == ["expired", "open"]
    assert close_hold(connection, dead) is None
    assert_true(host)


def test_the_sweep_ends_overdue_holds_and_no_others(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    charged = hold_tokens(connection, user, 300, ttl=60, now=NOW)
    charge_tokens(connection, charged, 100, now=NOW)
    hold_tokens(connection, user, 50, ttl=60, now=NOW)
    hold_tokens(connection, user, 7, ttl=7_200, now=NOW)
    assert expire_holds(connection, now=LATER) == (2, 250)
    assert expire_holds(connection, now=LATER) == (0, 0)
    assert statuses(host) == ["expired", "expired", "open"]
    assert balance(host, user) == (100, 7)
    assert_true(host)


def test_the_sweep_skips_a_user_whose_balance_is_locked(host: Host, connection: Connection) -> None:
    busy, free = host.subscriber(1_000), host.subscriber(1_000)
    for user in (busy, free):
        hold_tokens(connection, user, 100, ttl=60, now=NOW)
    connection.execute(text("SET lock_timeout = '100ms'"))
    with locked_balance(host, busy):
        assert expire_holds(connection, now=LATER) == (1, 100)
        assert statuses(host) == ["open", "expired"]
    assert expire_holds(connection, now=LATER) == (1, 100)
    assert_true(host)


def test_the_sweep_ends_a_limited_number_of_holds_the_longest_overdue_first(host: Host, connection: Connection) -> None:
    users = [host.subscriber(1_000) for _ in range(3)]
    for wait, tokens, user in zip((30, 10, 20), (200, 100, 300), users, strict=True):
        hold_tokens(connection, user, tokens, ttl=wait, now=NOW)
    assert expire_holds(connection, limit=1, now=LATER) == (1, 100)
    assert statuses(host) == ["open", "expired", "open"]
    assert expire_holds(connection, limit=2, now=LATER) == (2, 500)
    assert_true(host)


def test_open_holds_are_listed_newest_first_and_ended_ones_on_demand(host: Host, connection: Connection) -> None:
    user, other = host.subscriber(1_000), host.subscriber(1_000)
    first = hold_tokens(connection, user, 100, now=NOW)
    second = hold_tokens(connection, other, 200, now=NOW)
    charge_tokens(connection, second, 30, now=NOW)
    close_hold(connection, first, now=NOW)
    (row,) = list_holds(connection)
    assert (row.user_id, row.tokens_reserved, row.tokens_charged, row.tokens_left) == (other, 200, 30, 170)
    assert row.closed_at is None
    every = list_holds(connection, every_status=True)
    assert [(row.user_id, row.status, row.tokens_left) for row in every] == [
        (other, "open", 170),
        (user, "released", 0),
    ]
    assert [row.user_id for row in list_holds(connection, user_id=user, every_status=True)] == [user]
    oldest_first = list_holds(connection, every_status=True, oldest_first=True)
    assert [row.user_id for row in oldest_first] == [user, other]
    assert len(list_holds(connection, every_status=True, limit=1)) == 1
