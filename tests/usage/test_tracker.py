"""The usage tracker records one log row for each key, however often it is reported, and keeps the balances correct."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.sessions import in_background, locked, run_at_once, wait_for_lock
from tests.support.work import balance, hold_tokens
from trueup.accounts.account import read_account
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.database import retry
from trueup.database.engine import dispose_engine, get_engine
from trueup.errors import InvalidInputError, ServiceUnavailableError, UnknownUserError
from trueup.gate.holds import close_hold
from trueup.host.mapping import HostMapping
from trueup.monitoring.status import read_status
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings
from trueup.usage import tracker as tracking
from trueup.usage.log import TrackedUsage, ai_usage, list_usage, track_ai_usage

NOWHERE = "postgresql://absent@127.0.0.1:1/x"


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000)


def track(user: Any, prompt: int = 200, completion: int = 100, *, key: str = "call-1", **more: Any) -> TrackedUsage:
    given = {"section": "chat", "model_name": "test-model", **more}
    return track_ai_usage(user, prompt_tokens=prompt, completion_tokens=completion, key=key, **given)


def log_row(host: Host) -> dict[str, Any]:
    return dict(host.execute("SELECT * FROM ai_usage_log").mappings().one())


@pytest.fixture
def database_away(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that does not answer, without delays between the retries."""
    monkeypatch.setattr(retry, "RETRY_DELAYS_SECONDS", (0, 0))
    use_database(monkeypatch, NOWHERE)


def use_database(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", url)
    get_settings.cache_clear()
    dispose_engine()


def test_usage_is_one_row_that_counts_immediately_and_lowers_the_counter(host: Host, user: int) -> None:
    tracked = track(user, metadata={"ü": 1}, response_time_ms=12)
    assert (tracked.recorded, tracked.differs) == (True, False)
    row = log_row(host)
    assert str(row["id"]) == tracked.log_id
    assert (row["user_id"], row["section"], row["model_name"], row["success"]) == (user, "chat", "test-model", True)
    assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (200, 100, 300)
    assert (row["response_time_ms"], row["error_message"]) == (12, None)
    assert row["metadata"] == {"ü": 1, "usage_key": "call-1"}
    assert get_accurate_tokens_remaining(user) == (10_000, 300, 9_700)
    assert host.counter(user) == 9_700
    assert_true(host)


def test_a_total_given_by_the_provider_is_the_one_that_counts(host: Host, user: int) -> None:
    track(user, 200, 100, total_tokens=450)
    assert get_accurate_tokens_remaining(user) == (10_000, 450, 9_550)
    assert log_row(host)["total_tokens"] == 450


def test_a_repeated_key_is_recorded_once_with_its_first_figures(
    host: Host, user: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = track(user)
    again = track(user)
    assert (again.recorded, again.differs, again.log_id) == (False, False, first.log_id)
    assert caplog.records == []
    other = track(user, 999)
    assert (other.recorded, other.differs) == (False, True)
    assert "other figures" in caplog.text
    assert (host.used(user), host.counter(user)) == (300, 9_700)
    assert track(user, key="call-2").recorded
    assert track(host.subscriber()).recorded  # another user's key is another key
    assert host.used(user) == 600
    assert_true(host)


def test_one_of_eight_concurrent_reports_of_a_key_is_recorded(host: Host, user: int) -> None:
    results = run_at_once([lambda: track(user).recorded] * 8)
    assert sorted(results) == [False] * 7 + [True]
    assert (host.value("SELECT count(*) FROM ai_usage_log"), host.used(user), host.counter(user)) == (1, 300, 9_700)
    assert_true(host)


def test_concurrent_reports_of_different_keys_are_all_recorded(host: Host, user: int) -> None:
    run_at_once([lambda number=number: track(user, key=f"call-{number}") for number in range(8)])
    assert (host.used(user), host.counter(user)) == (2_400, 7_600)
    assert_true(host)


def test_usage_beyond_the_budget_is_recorded(host: Host) -> None:
    user = host.subscriber(100)
    assert track(user).recorded
    assert (get_accurate_tokens_remaining(user), host.counter(user)) == ((100, 300, 0), 0)
    assert_true(host)


def test_reported_usage_does_not_change_an_open_hold(host: Host, connection: Connection, user: int) -> None:
    hold = hold_tokens(connection, user, 1_000)
    track(user)
    assert balance(host, user) == (300, 1_000)
    assert_true(host)
    close_hold(connection, hold)


def test_a_failed_call_counts_no_tokens_and_a_later_success_can_use_its_key(host: Host, user: int) -> None:
    failed = track(user, 50, 0, success=False, error_message="time\x00out \ud83d")
    row = log_row(host)
    assert (row["success"], row["error_message"], row["total_tokens"]) == (False, "timeout ?", 50)
    assert (get_accurate_tokens_remaining(user), host.counter(user)) == ((10_000, 0, 10_000), 10_000)
    assert not track(user, 50, 0, success=False).recorded
    tracked = track(user)
    assert tracked.recorded
    assert tracked.log_id != failed.log_id
    assert (host.used(user), host.counter(user)) == (300, 9_700)
    assert_true(host)


def test_usage_before_the_window_is_logged_and_does_not_lower_the_counter(host: Host, user: int) -> None:
    track(user, created_at=START - timedelta(seconds=1), key="before")
    assert (get_accurate_tokens_remaining(user), host.counter(user)) == ((10_000, 0, 10_000), 10_000)
    track(user, created_at=START, key="first")
    assert (get_accurate_tokens_remaining(user), host.counter(user)) == ((10_000, 300, 9_700), 9_700)
    assert_true(host)


def test_a_time_slightly_ahead_of_the_database_becomes_now_and_a_later_one_is_refused(host: Host, user: int) -> None:
    now = host.value("SELECT clock_timestamp()")
    track(user, created_at=now + timedelta(minutes=1))
    assert log_row(host)["created_at"] < now + timedelta(minutes=1)
    with pytest.raises(InvalidInputError, match=r"created_at.*later"):
        track(user, key="late", created_at=now + timedelta(hours=1))
    assert host.value("SELECT count(*) FROM ai_usage_log") == 1
    assert_true(host)


def test_the_counter_of_a_host_that_holds_it_is_not_waited_for_and_reconciled_later(
    host: Host, connection: Connection, user: int
) -> None:
    with locked(host, "SELECT * FROM billing_subscription FOR UPDATE"):
        assert track(user).recorded
    assert host.counter(user) == 10_000
    assert host.value("SELECT counter_lowered FROM trueup.charge") is False
    assert_true(host)


def test_reported_usage_causes_no_drift_and_a_remaining_one_is_explained(host: Host, user: int) -> None:
    track(user)
    track(user, key="failed", success=False)
    track(user, key="old", created_at=START - timedelta(days=1))
    assert _drifts(host) == []
    with locked(host, "SELECT * FROM billing_subscription FOR UPDATE"):
        track(user, 70, 0, key="missed")
    [(observed, expected, cause)] = _drifts(host)
    assert (observed, expected) == (9_700, 9_630)
    assert cause == "missed_decrement"


def _drifts(host: Host) -> list[Any]:
    reconcile(get_engine(), HostMapping())
    return list(host.execute("SELECT observed, expected, cause FROM trueup.drift ORDER BY id"))


def test_reported_usage_does_not_count_as_over_a_hold(host: Host, connection: Connection, user: int) -> None:
    track(user)
    status = read_status(connection)
    assert (status.charges, status.tokens_charged, status.late_charges, status.tokens_over_hold) == (1, 300, 0, 0)


def subscribe(host: Host, user: int, plan: int) -> None:
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date) VALUES (1, :u, :p, :start)",
        u=user,
        p=plan,
        start=START,
    )


def test_usage_of_a_user_without_a_subscription_counts_once_there_is_one(host: Host, connection: Connection) -> None:
    user, plan = host.user(), host.plan(1_000)
    assert track(user).recorded
    subscribe(host, user, plan)
    assert read_account(connection, user).consumed == 300
    assert_true(host)


def test_a_balance_created_meanwhile_is_not_overwritten(host: Host, connection: Connection) -> None:
    user, plan = host.user(), host.plan(1_000)
    with in_background() as submit, locked(host, "LOCK TABLE ai_usage_log IN SHARE MODE") as session:
        tracking = submit(track, user)
        wait_for_lock(host)
        subscribe(host, user, plan)
        connection.execute(text("SELECT trueup.refresh_balances(ARRAY[:user]::bigint[], NULL)"), {"user": user})
        session.rollback()
        assert tracking.result().recorded
    assert read_account(connection, user).consumed == 300
    assert_true(host)


def test_an_unknown_user_is_refused_and_nothing_is_written(host: Host) -> None:
    with pytest.raises(UnknownUserError, match=r"user: .*424242.*tokens=300"):
        track(424_242)
    assert host.value("SELECT count(*) FROM trueup.charge") == 0


def test_a_host_without_a_column_for_errors_finds_them_among_the_metadata(host: Host, user: int) -> None:
    host.execute("ALTER TABLE ai_usage_log DROP COLUMN error_message")
    track(user, success=False, error_message="no answer")
    assert log_row(host)["metadata"] == {"usage_key": "call-1", "error": "no answer"}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"section": "x" * 51}, "section"),
        ({"section": None}, "section"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"completion_tokens": 1.0}, "completion_tokens"),
        ({"total_tokens": "300"}, "total_tokens"),
        ({"response_time_ms": None}, "response_time_ms"),
        ({"model_name": None}, "model_name"),
        ({"key": ""}, "key"),
        ({"key": "k" * 256}, "key"),
        ({"key": "a\x00"}, "key"),
        ({"key": 5}, "key"),
        ({"success": "yes"}, "success"),
        ({"error_message": 5}, "error_message"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"x": object()}}, "metadata"),
        ({"metadata": {"x": float("nan")}}, "metadata"),
        ({"metadata": {"x": "\x00"}}, "metadata"),
        ({"created_at": datetime(2024, 11, 5)}, "created_at"),  # noqa: DTZ001 - the missing time zone is the fault
        ({"created_at": "2024-11-05"}, "created_at"),
    ],
)
def test_a_malformed_argument_is_refused_by_its_name(host: Host, user: int, wrong: dict[str, Any], field: str) -> None:
    right = {"section": "chat", "prompt_tokens": 1, "completion_tokens": 1, "model_name": "m", "key": "k"}
    with pytest.raises(InvalidInputError, match=rf"^{field}: "):
        track_ai_usage(user, **{**right, **wrong})
    assert host.value("SELECT count(*) FROM ai_usage_log") == 0


@pytest.mark.parametrize("anonymous", [None, type("Anonymous", (), {"pk": None})()])
def test_usage_without_a_user_id_is_refused(database: str, anonymous: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^user: "):
        track(anonymous)


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "total_tokens", "response_time_ms"])
@pytest.mark.parametrize("figure", [2**31, 2**63, 2**70])
def test_a_figure_that_its_column_cant_store_is_refused_by_name(host: Host, user: int, field: str, figure: int) -> None:
    figures = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, field: figure}
    with pytest.raises(InvalidInputError, match=f"^{field}: .* nothing was recorded"):
        track_ai_usage(user, section="chat", model_name="m", key="k", **figures)
    assert host.value("SELECT count(*) FROM ai_usage_log") == host.value("SELECT count(*) FROM trueup.charge") == 0
    assert_true(host)


def test_a_figure_that_its_column_can_store_is_stored_in_full(host: Host, user: int) -> None:
    for column in ("prompt_tokens", "total_tokens"):
        host.execute(f"ALTER TABLE ai_usage_log ALTER {column} TYPE bigint")
    track(user, 3_000_000_000, 0)
    row = log_row(host)
    assert (row["prompt_tokens"], row["total_tokens"]) == (3_000_000_000, 3_000_000_000)
    assert balance(host, user) == (3_000_000_000, 0)
    assert_true(host)


def test_a_long_model_name_is_cut(host: Host, user: int) -> None:
    track(user, 1, 0, model_name="m\x00" * 200)
    assert log_row(host)["model_name"] == "m" * 100


def test_a_reported_row_changed_by_a_host_trigger_is_counted_as_stored(host: Host, user: int) -> None:
    host.execute(
        "CREATE FUNCTION cap() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.total_tokens := least(NEW.total_tokens, 50); RETURN NEW; END'; "
        "CREATE TRIGGER cap BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION cap()"
    )
    track(user)
    assert (get_accurate_tokens_remaining(user), host.counter(user)) == ((10_000, 50, 9_950), 9_950)
    assert_true(host)


def test_a_host_that_holds_the_user_and_then_the_subscription_is_not_deadlocked(host: Host, user: int) -> None:
    """Django checks foreign keys at commit; trueup's log row must be checked before trueup locks the counter."""
    with in_background() as submit, host.engine.connect() as session:
        session.execute(text("SELECT * FROM accounts_user FOR UPDATE"))
        tracking = submit(track, user)
        wait_for_lock(host)
        session.execute(text("SET LOCAL lock_timeout = '100ms'"))
        session.execute(text("UPDATE billing_subscription SET tokens_remaining = tokens_remaining - 1"))
        session.commit()
        assert tracking.result().recorded
    assert host.counter(user) == 9_699
    assert_true(host)


def test_a_write_is_retried_until_the_database_is_back(
    host: Host, database: str, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            use_database(monkeypatch, database)

    monkeypatch.setattr(retry.time, "sleep", wait)
    use_database(monkeypatch, NOWHERE)
    assert track(user).recorded
    assert (waits, host.used(user)) == ([0.1, 0.5], 300)


@pytest.mark.usefixtures("database_away")
def test_usage_that_cannot_be_recorded_is_an_error_and_is_logged(user: int, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServiceUnavailableError):
        track(user)
    assert f"usage not recorded: user={user} key='call-1' tokens=300" in caplog.text


def test_the_rows_are_listed_beside_the_hosts(host: Host, connection: Connection, user: int) -> None:
    host.log(user, 5)
    track(user)
    assert {row.total_tokens for row in list_usage(connection, HostMapping(), user)} == {5, 300}


def test_a_block_records_its_figures_and_the_calls_duration(host: Host, user: int) -> None:
    with ai_usage(user, section="knowledge_qa", key="call-1", model_name="m", metadata={"a": 1}) as usage:
        usage.set(prompt_tokens=1, completion_tokens=1)
        usage.set(prompt_tokens=200, completion_tokens=100, response_time_ms=77)
    assert usage.recorded is not None
    assert usage.recorded.recorded
    row = log_row(host)
    assert (row["total_tokens"], row["response_time_ms"], row["section"], row["model_name"]) == (
        300,
        77,
        "knowledge_qa",
        "m",
    )
    assert row["metadata"] == {"a": 1, "usage_key": "call-1"}
    assert_true(host)


def test_the_time_is_measured_from_the_beginning_of_the_block(
    host: Host, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 200.0, 201.5])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with ai_usage(user, section="chat", key="call-1") as usage:
        usage.set(prompt_tokens=1, completion_tokens=1, model_name="other")
    assert (log_row(host)["response_time_ms"], log_row(host)["model_name"]) == (1_500, "other")


def test_a_block_that_fails_before_its_figures_is_a_failed_call_and_its_error_is_raised(host: Host, user: int) -> None:
    with pytest.raises(LookupError, match="no model"), ai_usage(user, section="chat", key="call-1"):
        raise LookupError("no model of that name")
    row = log_row(host)
    assert (row["success"], row["total_tokens"]) == (False, 0)
    assert row["error_message"] == "LookupError: no model of that name"
    assert host.counter(user) == 10_000


def fail_after_figures(user: int) -> None:
    with ai_usage(user, section="chat", key="call-1") as usage:
        usage.set(prompt_tokens=200, completion_tokens=100)
        raise LookupError("no title")


def test_figures_that_were_set_count_if_the_rest_of_the_block_fails(host: Host, user: int) -> None:
    with pytest.raises(LookupError):
        fail_after_figures(user)
    row = log_row(host)
    assert (row["success"], row["error_message"]) == (True, "LookupError: no title")
    assert (host.used(user), host.counter(user)) == (300, 9_700)
    assert_true(host)


def test_a_block_without_figures_is_an_error_and_zeros_are_figures(host: Host, user: int) -> None:
    with pytest.raises(InvalidInputError, match=r"call-1.*usage\.set"), ai_usage(user, section="chat", key="call-1"):
        pass
    assert host.value("SELECT count(*) FROM ai_usage_log") == 0
    with ai_usage(user, section="chat", key="call-1") as usage:
        usage.set(prompt_tokens=0, completion_tokens=0)
    assert log_row(host)["total_tokens"] == 0


def test_figures_set_after_the_block_are_refused(host: Host, user: int) -> None:
    with ai_usage(user, section="chat", key="call-1") as usage:
        usage.set(prompt_tokens=200, completion_tokens=100)
    with pytest.raises(InvalidInputError, match=r"call-1.*has ended.*not recorded"):
        usage.set(prompt_tokens=900, completion_tokens=100)
    assert host.used(user) == 300


@pytest.mark.parametrize(
    "wrong", [{"section": ""}, {"key": ""}, {"metadata": {"x": {1}}}, {"model_name": 1}, {"user": None}]
)
def test_a_block_with_wrong_arguments_does_not_begin(user: int, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        ai_usage(**{"user": user, "section": "chat", "key": "k", **wrong})


@pytest.mark.usefixtures("database_away")
def test_a_blocks_own_error_is_raised_with_a_note_unless_tokens_would_be_lost(user: int) -> None:
    with pytest.raises(LookupError) as failed, ai_usage(user, section="chat", key="call-1"):
        raise LookupError("no model")
    assert "not in the usage log" in failed.value.__notes__[0]
    with pytest.raises(ServiceUnavailableError):
        fail_after_figures(user)


def test_a_blocks_own_error_is_raised_if_the_log_refuses_the_row(host: Host, user: int) -> None:
    host.execute("ALTER TABLE ai_usage_log ADD CHECK (total_tokens > 0)")
    with pytest.raises(LookupError) as failed, ai_usage(user, section="chat", key="call-1"):
        raise LookupError("no model")
    (note,) = failed.value.__notes__
    assert "not in the usage log" in note
    assert "INSERT" not in note


def test_an_async_block_records_too_also_when_it_is_cancelled(host: Host, user: int) -> None:
    async def work(key: str, *, cancelled: bool) -> None:
        async with ai_usage(user, section="chat", key=key) as usage:
            usage.set(prompt_tokens=200, completion_tokens=100)
            if cancelled:
                raise asyncio.CancelledError

    asyncio.run(work("call-1", cancelled=False))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work("call-2", cancelled=True))
    assert host.used(user) == 600
    assert_true(host)
