from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import QueuePool

from tests.support.books import assert_true
from tests.support.host import NOW, START, Host
from tests.support.sessions import (
    backend_pid,
    in_background,
    locked,
    run_at_once,
    wait_for_lock,
)
from tests.support.work import balance, charge_tokens, hold_tokens, usage_of
from trueup.accounts.account import read_account
from trueup.errors import UnknownUserError
from trueup.gate.holds import Hold, close_hold, expire_holds
from trueup.usage.charges import Charge, Usage, find_answer, record_charge
from trueup.usage.log import track_ai_usage

pytestmark = pytest.mark.dated


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000)


@pytest.fixture
def hold(connection: Connection, user: int) -> Hold:
    return hold_tokens(connection, user, 1_000, task="task")


def test_a_charge_moves_tokens_from_the_hold_to_the_log(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    charge = charge_tokens(connection, hold, 300)
    assert charge == Charge(recorded=True, late=False, tokens_over=0, tokens_left=700)
    assert balance(host, user) == (300, 700)
    assert (host.used(user), host.counter(user)) == (300, 9_700)
    assert_true(host)


def test_the_log_row_says_what_the_call_cost_and_which_task_it_was(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    usage = Usage(prompt_tokens=7, completion_tokens=4, total_tokens=12, response_time_ms=2**40, model_name="m" * 150)
    record_charge(connection, hold, call_key="1", usage=usage, metadata={"task_id": "task", "ü": "%:x"}, now=NOW)
    row = host.execute("SELECT * FROM ai_usage_log").mappings().one()
    assert row["created_at"] == NOW
    assert (row["user_id"], row["section"], row["success"]) == (user, "chat", True)
    assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (7, 4, 12)
    assert (row["response_time_ms"], row["model_name"]) == (2**31 - 1, "m" * 100)
    assert row["metadata"] == {"task_id": "task", "ü": "%:x"}


def test_a_call_is_charged_once_however_often_it_is_recorded(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    charge_tokens(connection, hold, 300, key="a")
    again = charge_tokens(connection, hold, 999, key="a")
    assert again == Charge(recorded=False, late=False, tokens_over=0, tokens_left=700)
    charge_tokens(connection, hold, 50, key="b")
    assert (host.used(user), host.counter(user), balance(host, user)) == (350, 9_650, (350, 650))
    assert_true(host)


def test_one_of_many_concurrent_recordings_is_charged(host: Host, database: str, user: int, hold: Hold) -> None:
    engine = create_engine(database, poolclass=QueuePool, pool_size=8, isolation_level="AUTOCOMMIT")

    def record() -> bool:
        with engine.connect() as own:
            return charge_tokens(own, hold, 300).recorded

    assert sorted(run_at_once([record] * 8)) == [False] * 7 + [True]
    engine.dispose()
    assert balance(host, user) == (300, 700)
    assert_true(host)


def test_the_same_call_has_the_same_log_id_and_another_call_user_or_task_another(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    ids = []
    other_user = hold_tokens(connection, host.subscriber(), 100, task="task")
    split = hold_tokens(connection, user, 100, task="task/1")
    for of, key in ((hold, "1/1"), (hold, "1/1"), (hold, "2"), (other_user, "1/1"), (split, "1")):
        charge_tokens(connection, of, 1, key=key)
        ids.append(host.value("DELETE FROM ai_usage_log RETURNING id"))
        host.execute("TRUNCATE trueup.charge")
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("late", [False, True])
def test_two_users_tasks_of_one_id_and_one_call_are_both_charged(
    host: Host, connection: Connection, late: bool
) -> None:
    users = [host.subscriber(), host.subscriber()]
    for user in users:
        hold = hold_tokens(connection, user, 100, task="nightly")
        if late:
            close_hold(connection, hold)
        charge_tokens(connection, hold, 60)
    assert [(host.used(user), host.counter(user)) for user in users] == [(60, 9_940)] * 2


@pytest.mark.parametrize("late", [False, True])
def test_one_call_key_of_two_tasks_of_a_user_is_two_charges(
    host: Host, connection: Connection, user: int, late: bool
) -> None:
    for task in ("first", "second"):
        hold = hold_tokens(connection, user, 100, task=task)
        if late:
            close_hold(connection, hold)
        assert charge_tokens(connection, hold, 60).recorded
    assert (host.used(user), host.counter(user)) == (120, 9_880)


def test_usage_beyond_the_hold_is_charged_and_reported(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    assert charge_tokens(connection, hold, 1_300).tokens_over == 300
    assert balance(host, user) == (1_300, 0)
    assert charge_tokens(connection, hold, 5, key="2").tokens_over == 5
    assert host.used(user) == 1_305
    figures = host.execute("SELECT tokens_reserved, tokens_covered, tokens_charged, calls FROM trueup.hold").one()
    assert figures == (1_000, 1_000, 1_305, 2)
    assert_true(host)


def test_a_charge_after_its_hold_ended_is_recorded_and_flagged_late(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    close_hold(connection, hold)
    assert charge_tokens(connection, hold, 300) == Charge(recorded=True, late=True, tokens_over=300, tokens_left=0)
    assert charge_tokens(connection, hold, 300).late
    assert balance(host, user) == (300, 0)
    assert_true(host)


@pytest.mark.parametrize("swept", [True, False])
def test_a_charge_of_an_expired_hold_is_late(host: Host, connection: Connection, user: int, swept: bool) -> None:
    hold = hold_tokens(connection, user, 1_000, ttl=60, now=NOW)
    end = NOW + timedelta(seconds=60)
    if swept:
        expire_holds(connection, now=end)
    assert charge_tokens(connection, hold, 10, now=end).late
    assert balance(host, user) == (10, 0)
    assert_true(host)


def test_a_late_charge_takes_nothing_from_another_request_that_has_the_id_now(
    host: Host, connection: Connection, user: int
) -> None:
    """That request passed the gate with its estimate, and would fail for want of tokens that it did not spend."""
    first = hold_tokens(connection, user, 300, task="t", request="first", ttl=600, now=NOW)
    expire_holds(connection, now=NOW + timedelta(seconds=600))
    second = hold_tokens(connection, user, 300, task="t", request="second", now=NOW + timedelta(seconds=601))
    late = charge_tokens(connection, first, 200, now=NOW + timedelta(seconds=602))
    assert (late.late, late.tokens_over) == (True, 200)
    assert balance(host, user) == (200, 300)
    assert charge_tokens(connection, second, 300, now=NOW + timedelta(seconds=602)).tokens_over == 0
    assert_true(host)


def test_a_fenced_attempts_charge_is_late_and_uses_the_hold_of_the_later_attempt(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    successor = hold_tokens(connection, user, 1_000, task="task")
    assert charge_tokens(connection, hold, 400, key="a") == Charge(
        recorded=True, late=True, tokens_over=0, tokens_left=0
    )
    assert charge_tokens(connection, successor, 100, key="b").tokens_left == 500
    assert balance(host, user) == (500, 500)
    assert_true(host)


@pytest.mark.parametrize(
    ("counter", "left"),
    [(10_000, 9_700), (300, 0), (299, 0), (1, 0), (0, 0), (-5, -5), (None, None), (2**31 - 1, 2**31 - 301)],
)
def test_the_counter_is_lowered_to_no_less_than_zero_and_an_odd_one_left_alone(
    host: Host, connection: Connection, user: int, hold: Hold, counter: int | None, left: int | None
) -> None:
    host.execute("UPDATE billing_subscription SET tokens_remaining = :counter", counter=counter)
    other = host.subscriber(10_000)
    version = host.value("SELECT xmin::text FROM billing_subscription WHERE user_id = :user", user=user)
    charge_tokens(connection, hold, 300)
    assert (host.counter(user), host.counter(other)) == (left, 10_000)
    assert host.value("SELECT counter_lowered FROM trueup.charge")
    written = host.value("SELECT xmin::text FROM billing_subscription WHERE user_id = :user", user=user) != version
    assert written is (counter != left)


@pytest.mark.parametrize("counter", [10_000, 1])
def test_a_charge_does_not_wait_for_a_host_that_holds_the_counter(
    host: Host, user: int, hold: Hold, counter: int
) -> None:
    host.execute("UPDATE billing_subscription SET tokens_remaining = :counter", counter=counter)
    with locked(host, "SELECT * FROM billing_subscription FOR UPDATE"), host.engine.begin() as session:
        session.execute(text("SET LOCAL lock_timeout = '100ms'; SET LOCAL track_functions = 'all'"))
        assert charge_tokens(session, hold, 300).recorded
        called = session.scalars(text("SELECT funcname FROM pg_stat_xact_user_functions")).all()
    assert "record_other_charge" not in called  # which would come after the time-out
    assert (host.used(user), host.counter(user)) == (300, counter)
    assert not host.value("SELECT counter_lowered FROM trueup.charge")
    assert_true(host)


def test_usage_before_the_start_of_a_future_window_is_logged_and_does_not_count_in_it(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 500, now=NOW)
    host.execute("UPDATE billing_subscription SET start_date = :at", at=NOW + timedelta(days=1))
    charge_tokens(connection, hold, 300, now=NOW)
    assert (host.used(user), balance(host, user)) == (300, (0, 200))
    assert_true(host)


def test_usage_in_the_last_minutes_before_a_window_counts_from_its_first_moment(
    host: Host, connection: Connection
) -> None:
    start = NOW + timedelta(minutes=2)
    user = host.subscriber(1_000, start=start)
    charge_tokens(connection, hold_tokens(connection, user, 500, now=NOW), 300, now=NOW)
    assert host.value("SELECT created_at FROM ai_usage_log") == start
    assert balance(host, user) == (300, 200)
    assert_true(host)


def test_a_charge_after_the_window_moved_counts_in_the_new_one_only(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    charge_tokens(connection, hold, 100, key="a", now=NOW)
    host.execute("UPDATE billing_subscription SET start_date = :at", at=NOW + timedelta(seconds=1))
    charge_tokens(connection, hold, 30, key="b", now=NOW + timedelta(seconds=2))
    assert balance(host, user) == (30, 870)
    assert_true(host)


def test_a_charge_without_a_subscription_counts_once_there_is_one(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    host.execute("DELETE FROM billing_subscription")
    assert charge_tokens(connection, hold, 300).recorded
    assert_true(host)
    assert balance(host, user) == (300, 700)


def test_a_charge_concurrent_with_the_creation_of_the_balance_counts_once(host: Host, connection: Connection) -> None:
    """A balance built while a charge without a balance is in progress must include the charge's log row."""
    user, plan = host.user(), host.plan(1_000)
    never_held = Hold(
        user_id=user,
        task_id="t",
        feature_name="Test",
        section="chat",
        attempt=1,
        reattached=False,
        replay=False,
        tokens_left=0,
        expires_at=NOW,
    )
    with host.engine.connect() as session:
        charge_tokens(session, never_held, 40)
        host.execute(
            "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date) VALUES (1, :u, :p, :start)",
            u=user,
            p=plan,
            start=START,
        )
        # The sweep builds it, because a gate would queue behind the charge.
        connection.execute(text("SELECT trueup.refresh_balances(ARRAY[:user]::bigint[], NULL)"), {"user": user})
        session.commit()
    assert_true(host)
    assert read_account(connection, user).consumed == 40


def test_a_deleted_users_charge_is_refused_by_name(host: Host, connection: Connection, user: int, hold: Hold) -> None:
    host.execute("DELETE FROM billing_subscription; DELETE FROM accounts_user")
    with pytest.raises(UnknownUserError, match=rf"{user}.*300 tokens"):
        charge_tokens(connection, hold, 300)
    assert_true(host)


@pytest.mark.parametrize("deferrable", ["NOT DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_host_that_holds_the_user_and_then_the_subscription_is_not_deadlocked(
    host: Host, connection: Connection, user: int, hold: Hold, deferrable: str
) -> None:
    """Django checks foreign keys at commit; trueup's log row must be checked before trueup locks the counter."""
    host.execute(
        "ALTER TABLE ai_usage_log DROP CONSTRAINT ai_usage_log_user_id_fkey; ALTER TABLE ai_usage_log "
        f"ADD CONSTRAINT key FOREIGN KEY (user_id) REFERENCES accounts_user (id) {deferrable}"
    )
    pid = backend_pid(connection)
    with in_background() as submit, host.engine.connect() as session:
        session.execute(text("SELECT * FROM accounts_user FOR UPDATE"))
        charging = submit(charge_tokens, connection, hold, 300)
        wait_for_lock(host, pid)
        session.execute(text("SET LOCAL lock_timeout = '100ms'"))
        session.execute(text("UPDATE billing_subscription SET tokens_remaining = tokens_remaining - 1"))
        session.commit()
        assert charging.result().recorded
    assert host.counter(user) == 9_699
    assert_true(host)


@pytest.mark.parametrize(
    "answer", [{"text": "a\x00b"}, {"text": "half an emoji \ud83d"}, {"score": float("nan")}, {"text": "\\u0000"}]
)
def test_an_answer_that_postgresql_cant_keep_never_costs_the_charge(
    host: Host, connection: Connection, user: int, hold: Hold, answer: dict[str, Any]
) -> None:
    charge_tokens(connection, hold, 300, answer=answer, metadata=answer)
    assert host.used(user) == 300
    assert find_answer(connection, hold, "1") in (None, answer)


@pytest.mark.parametrize(
    ("figures", "logged"),
    [
        ({"model_name": "a\x00b\ud83d"}, ("ab?", 300)),
        ({"total_tokens": 2**31}, ("test-model", 2**31 - 1)),
        ({"total_tokens": 2**70, "prompt_tokens": 2**70}, ("test-model", 2**31 - 1)),
        ({"total_tokens": -5, "completion_tokens": -5, "response_time_ms": -1}, ("test-model", 0)),
    ],
)
def test_figures_that_the_log_cant_hold_are_recorded_at_its_limits(
    host: Host, connection: Connection, hold: Hold, figures: dict[str, Any], logged: tuple[str, int]
) -> None:
    record_charge(connection, hold, call_key="1", usage=usage_of(300, **figures))
    assert tuple(host.execute("SELECT model_name, total_tokens FROM ai_usage_log").one()) == logged
    assert_true(host)


def test_figures_that_the_logs_columns_can_hold_are_recorded_in_full(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    for column in ("prompt_tokens", "completion_tokens", "total_tokens"):
        host.execute(f"ALTER TABLE ai_usage_log ALTER {column} TYPE bigint")
    record_charge(connection, hold, call_key="1", usage=usage_of(3_000_000_000))
    assert host.used(user) == balance(host, user)[0] == 3_000_000_000
    assert_true(host)


@pytest.mark.parametrize(
    ("change", "counted"),
    [
        ("NEW.total_tokens := least(NEW.total_tokens, 50)", 50),
        ("NEW.success := false", 0),
        ("NEW.created_at := NEW.created_at - interval ''100 years''", 0),
    ],
)
def test_a_row_changed_by_a_host_trigger_is_counted_as_stored(
    host: Host, connection: Connection, user: int, hold: Hold, change: str, counted: int
) -> None:
    host.execute(
        f"CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {change}; RETURN NEW; END'; "
        "CREATE TRIGGER change BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION change()"
    )
    charge_tokens(connection, hold, 300)
    assert balance(host, user) == (counted, 700)
    assert_true(host)


def test_a_stored_answer_is_found_only_by_its_call(host: Host, connection: Connection, hold: Hold) -> None:
    charge_tokens(connection, hold, 1, key="a", answer={"text": "hello % :x ü"})
    charge_tokens(connection, hold, 1, key="b")
    assert find_answer(connection, hold, "a") == {"text": "hello % :x ü"}
    assert find_answer(connection, hold, "b") is None
    assert find_answer(connection, hold, "c") is None
    assert find_answer(connection, hold_tokens(connection, host.subscriber(), 1, task="task"), "a") is None


def test_a_balance_created_while_a_charge_is_written_is_not_overwritten(host: Host, connection: Connection) -> None:
    """The work was paid for, with or without a subscription of its user at that time."""
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 500)
    host.execute("DELETE FROM trueup.hold; DELETE FROM trueup.balance")
    host.execute("UPDATE billing_subscription SET user_id = :other", other=host.user())
    another = host.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with another, in_background() as submit, locked(host, "LOCK TABLE ai_usage_log IN SHARE MODE") as session:
        charging = submit(charge_tokens, another, hold, 300)
        wait_for_lock(host)
        host.execute("UPDATE billing_subscription SET user_id = :user", user=user)
        connection.execute(text("SELECT trueup.refresh_balances(ARRAY[:user]::bigint[], NULL)"), {"user": user})
        session.rollback()
        assert charging.result().recorded
    assert read_account(connection, user).consumed == 300
    assert_true(host)


def test_a_row_that_the_host_gives_another_id_counts_once(host: Host, connection: Connection, user: int) -> None:
    host.execute(
        "CREATE FUNCTION name_it() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.id := gen_random_uuid(); RETURN NEW; END'"
    )
    host.execute("CREATE TRIGGER name_it BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION name_it()")
    charge_tokens(connection, hold_tokens(connection, user, 1_000), 300)
    track_ai_usage(user, section="chat", prompt_tokens=30, completion_tokens=20, model_name="m", key="1")
    hold_tokens(connection, user, 100)
    assert (balance(host, user), host.counter(user)) == ((350, 800), 9_650)
    assert_true(host)
