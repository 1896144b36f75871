"""Holds for requests: the same gate as for tasks, each charge once, and no tokens held after the block."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.round_trips import round_trips
from tests.support.sessions import in_background, locked_balance, run_at_once, wait_for_lock
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.work import balance
from trueup.billing import token_hold
from trueup.billing.decorators import ai_tokens
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.database import retry
from trueup.database.engine import connect, dispose_engine
from trueup.database.threads import in_thread
from trueup.errors import (
    HoldBusyError,
    HoldOvertakenError,
    InvalidInputError,
    NoHoldError,
    ServiceUnavailableError,
    TokensDenied,
)
from trueup.gate.holds import Hold, list_holds, open_hold
from trueup.gate.owed_charges import settle_owed_charges
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers import provider_from_settings
from trueup.llm.running import spending_from
from trueup.settings.settings import get_settings
from trueup.usage.charges import record_charge


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000)


def spend(hold: ai_tokens, tokens: int = 300, **more: Any) -> Any:
    return hold.charge(prompt_tokens=tokens - 100, completion_tokens=100, model_name="m", **more)


def statuses() -> list[str]:
    with connect() as connection:
        return [row.status for row in list_holds(connection, every_status=True)]


def test_tokens_are_held_and_charged_in_the_block_and_released_after_it(host: Host, user: int) -> None:
    with ai_tokens(user, 1_500, "Summaries", "chat") as hold:
        assert (balance(host, user), hold.tokens_left) == ((0, 1_500), 1_500)
        charge = spend(hold, metadata={"a": 1}, response_time_ms=5)
        assert (charge.recorded, charge.tokens_over, hold.tokens_left) == (True, 0, 1_200)
        assert balance(host, user) == (300, 1_200)
    assert (balance(host, user), host.used(user), host.counter(user)) == ((300, 0), 300, 9_700)
    row = host.execute("SELECT section, model_name, metadata FROM ai_usage_log").one()
    assert (row.section, row.model_name) == ("chat", "m")
    assert row.metadata["feature"] == "Summaries"
    assert row.metadata["a"] == 1
    assert statuses() == ["settled"]
    assert_true(host)


@pytest.mark.parametrize("failure", [LookupError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_a_block_that_ends_with_an_error_releases_its_tokens_too(
    host: Host, user: int, failure: type[BaseException]
) -> None:
    with pytest.raises(failure), ai_tokens(user, 1_500):
        raise failure
    assert (balance(host, user), statuses()) == ((0, 0), ["released"])


def test_a_denial_carries_the_body_of_a_402_and_nothing_is_held(host: Host) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(TokensDenied) as denied, ai_tokens(user, 1_001, "Summaries"):
        pytest.fail("the block ran")
    assert denied.value.payload == {
        "success": False,
        "error": "Insufficient tokens for Summaries: 1001 needed, 1000 available",
        "error_code": "insufficient_tokens",
        "tokens_remaining": 1_000,
        "original_tokens": 1_000,
        "consumed_tokens": 0,
        "days_remaining": None,
    }
    with pytest.raises(TokensDenied, match="no_subscription"), ai_tokens(None, 1):
        pytest.fail("the block ran")
    assert statuses() == []


def test_concurrent_blocks_never_hold_more_than_the_budget(host: Host) -> None:
    user = host.subscriber(4_000)
    everyone_has_asked = threading.Barrier(8, timeout=DEADLINE_SECONDS)

    def work() -> bool:
        try:
            with ai_tokens(user, 1_000) as hold:
                everyone_has_asked.wait()
                spend(hold, 1_000)
                return True
        except TokensDenied:
            everyone_has_asked.wait()
            return False

    assert sorted(run_at_once([work] * 8)) == [False] * 4 + [True] * 4
    assert (host.used(user), host.counter(user), balance(host, user)) == (4_000, 0, (4_000, 0))
    assert_true(host)


def test_each_charge_is_another_call_unless_it_has_the_same_key(host: Host, user: int) -> None:
    with ai_tokens(user, 1_500) as hold:
        spend(hold)
        spend(hold)
        assert spend(hold, key="a~1").recorded
        assert not spend(hold, key="a~1").recorded
        assert spend(hold, key="a").recorded
        assert spend(hold, key="a%7E1").recorded
        assert hold.tokens_left == 0
    assert host.used(user) == 1_500
    assert_true(host)


def test_a_concurrent_charge_that_returns_late_does_not_raise_the_tokens_left(
    host: Host, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record_and_tell_the_first_last(connection: Connection, hold: Hold, **values: Any) -> Any:
        charge = record_charge(connection, hold, **values)
        assert values["call_key"] != "1" or second_was_told.wait(DEADLINE_SECONDS)
        return charge

    second_was_told = threading.Event()
    monkeypatch.setattr(token_hold, "record_charge", record_and_tell_the_first_last)
    with in_background() as submit, ai_tokens(user, 1_000) as hold:
        first = submit(spend, hold)
        wait_for(lambda: host.used(user) == 300)
        spend(hold)
        second_was_told.set()
        assert first.result().tokens_left == 700
        assert hold.tokens_left == 400
        assert hold.extend(100)
        assert hold.tokens_left == 500
    assert_true(host)


def test_usage_beyond_the_hold_is_recorded_and_reported(host: Host, user: int) -> None:
    with ai_tokens(user, 200) as hold:
        assert spend(hold).tokens_over == 100
        assert hold.tokens_left == 0
    assert host.used(user) == 300
    assert_true(host)


def test_a_hold_is_extended_if_the_budget_allows_it(host: Host, user: int) -> None:
    with ai_tokens(user, 9_000) as hold:
        assert hold.extend(1_000)
        assert hold.tokens_left == 10_000
        assert not hold.extend(1)
        assert hold.tokens_left == 10_000
        with pytest.raises(InvalidInputError, match="tokens"):
            hold.extend(-1)
    assert balance(host, user) == (0, 0)


def test_an_expired_hold_is_not_extended_and_its_charge_is_late(host: Host, user: int) -> None:
    with ai_tokens(user, 1_000) as hold:
        host.execute("UPDATE trueup.hold SET expires_at = clock_timestamp() - interval '1 second'")
        get_accurate_tokens_remaining(user)
        with pytest.raises(HoldOvertakenError):
            hold.extend(1)
        assert spend(hold).late
        assert hold.tokens_left == 0
    assert (host.used(user), statuses()) == (300, ["expired"])
    assert_true(host)


def test_a_copy_of_a_request_is_refused_while_it_runs_and_passes_the_gate_after_it(host: Host) -> None:
    user = host.subscriber(1_000)
    with ai_tokens(user, 400, key="order 7") as hold:
        spend(hold)
        with pytest.raises(HoldBusyError), ai_tokens(user, 400, key="order 7"):
            pytest.fail("the copy ran")
        with ai_tokens(host.subscriber(), 400, key="order 7"):
            pass  # another user's key is another key
    with ai_tokens(user, 400, key="order 7") as hold:
        assert hold.tokens_left == 400
        assert spend(hold).recorded  # bought again, so charged again
    assert host.used(user) == 600
    with pytest.raises(TokensDenied), ai_tokens(user, 401, key="order 7"):
        pytest.fail("it ran without tokens")
    assert_true(host)


@pytest.mark.parametrize("key", [None, "order 7"])
def test_a_block_whose_first_answer_was_lost_is_admitted_and_holds_its_tokens_once(
    host: Host, user: int, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    tries = []

    def open_and_lose_the_answer(connection: Connection, **values: Any) -> Hold:
        hold = open_hold(connection, **values)
        tries.append(hold)
        if len(tries) == 1:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return hold

    monkeypatch.setattr(token_hold, "open_hold", open_and_lose_the_answer)
    with ai_tokens(user, 1500, key=key) as hold:
        assert balance(host, user) == (0, 1500)
        spend(hold)
        if key is not None:
            with pytest.raises(HoldBusyError), ai_tokens(user, 1500, key=key):
                pass
    assert sorted(statuses()) == ["released", "settled"]
    assert_true(host)


def test_no_key_of_a_call_is_taken_for_the_second_purchase_of_another_call(host: Host, user: int) -> None:
    with ai_tokens(user, 400, key="order 7") as hold:
        spend(hold, key="a")
    with ai_tokens(user, 1_000, key="order 7") as hold:
        assert spend(hold, key="a~2").recorded
        assert spend(hold, key="a").recorded
    assert host.used(user) == 900


def test_a_hold_is_usable_only_in_its_block_and_in_one_block_at_a_time(host: Host, user: int) -> None:
    hold = ai_tokens(user, 1_000)
    with pytest.raises(NoHoldError):
        spend(hold)
    with hold, pytest.raises(InvalidInputError, match="in use"), hold:
        pytest.fail("twice")
    with pytest.raises(NoHoldError):
        hold.extend(1)
    with hold:
        spend(hold)
    assert (host.used(user), hold.tokens_left) == (300, 0)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"estimated_tokens": -1}, "estimated_tokens"),
        ({"estimated_tokens": 1.5}, "estimated_tokens"),
        ({"feature_name": " "}, "feature_name"),
        ({"feature_name": None}, "feature_name"),
        ({"section": ""}, "section"),
        ({"key": ""}, "key"),
        ({"user": "five"}, "user_id"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_held(database: str, wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{field}: "):
        ai_tokens(**{"user": 1, "estimated_tokens": 1, **wrong})


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"completion_tokens": None}, "completion_tokens"),
        ({"total_tokens": 1.0}, "total_tokens"),
        ({"model_name": None}, "model_name"),
        ({"key": ""}, "key"),
        ({"metadata": {"x": {1}}}, "metadata"),
        ({"response_time_ms": "1"}, "response_time_ms"),
    ],
)
def test_wrong_figures_are_refused_by_name_and_use_no_number_of_a_call(
    host: Host, user: int, wrong: dict[str, Any], field: str
) -> None:
    with ai_tokens(user, 1_000) as hold:
        with pytest.raises(InvalidInputError, match=rf"^{field}: "):
            hold.charge(**{"prompt_tokens": 1, "completion_tokens": 1, "model_name": "m", **wrong})
        spend(hold)
    assert host.value("SELECT call_key FROM trueup.charge") == "1"


def test_without_the_database_nothing_runs_and_a_charge_is_not_lost_silently(
    host: Host, user: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "RETRY_DELAYS_SECONDS", (0,))
    with ai_tokens(user, 1_000) as hold:
        monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://user@127.0.0.1:1/x")
        get_settings.cache_clear()
        dispose_engine()
        with pytest.raises(ServiceUnavailableError):
            spend(hold)
        assert "tokens=300" in caplog.text
    assert "hold not closed" in caplog.text
    with pytest.raises(ServiceUnavailableError), ai_tokens(user, 1_000):
        pytest.fail("it ran unmetered")


def test_a_charge_is_owed_while_the_hosts_tables_change_and_written_afterwards(host: Host, user: int) -> None:
    with ai_tokens(user, 1_000) as hold:
        host.execute("ALTER TABLE ai_usage_log RENAME COLUMN section TO part")
        assert spend(hold).owed
        assert balance(host, user) == (300, 700)
        host.execute("ALTER TABLE ai_usage_log RENAME COLUMN part TO section")
        with connect() as connection:
            assert settle_owed_charges(connection) == (1, 0)
    assert host.used(user) == 300
    assert_true(host)


def test_the_last_charge_releases_the_rest_in_the_same_round_trip(host: Host, user: int, tmp_path: Path) -> None:
    with ai_tokens(user, 1_000) as hold:
        spend(hold, last=True)  # the first one connects
    with round_trips(tmp_path / "trace") as seen, ai_tokens(user, 1_000) as hold:
        assert spend(hold, last=True).closed
        assert (balance(host, user), hold.tokens_left) == ((600, 0), 0)
    assert (seen, statuses()) == (["I", "I"], ["settled", "settled"])
    assert_true(host)


def test_the_block_closes_a_hold_that_its_last_charge_could_not_close(host: Host, user: int) -> None:
    host.execute("ALTER TABLE ai_usage_log ADD CHECK (total_tokens <> 300)")
    with ai_tokens(user, 1_000) as hold:
        refused = spend(hold, last=True)
        assert (refused.owed, refused.closed, balance(host, user)) == (True, False, (300, 700))
    with ai_tokens(user, 1_000) as hold:
        spend(hold, 200, key="a")
        again = spend(hold, 200, key="a", last=True)
        assert (again.recorded, again.closed, balance(host, user)) == (False, False, (500, 800))
    assert (balance(host, user), statuses()) == ((500, 0), ["settled", "settled"])
    assert_true(host)


def test_a_charge_after_the_last_one_is_recorded_as_late(host: Host, user: int) -> None:
    with ai_tokens(user, 1_000) as hold:
        spend(hold, last=True)
        late = spend(hold)
        assert (late.recorded, late.late, late.tokens_over) == (True, True, 300)
    assert balance(host, user) == (600, 0)
    assert_true(host)


def test_trueups_own_model_client_spends_from_the_hold(host: Host, user: int) -> None:
    model = MeteredModel(lambda: provider_from_settings(get_settings()))
    with ai_tokens(user, 500, "Ask", "chat") as hold, spending_from(hold.hold):
        answer = model.complete([Message(role="user", content="Summarize: orders are sent within two days.")])
    assert host.used(user) == answer.total_tokens > 0
    assert balance(host, user) == (answer.total_tokens, 0)
    assert_true(host)


def test_the_same_question_in_two_blocks_of_one_hold_is_two_charges(host: Host, user: int) -> None:
    model = MeteredModel(lambda: provider_from_settings(get_settings()))
    question = [Message(role="user", content="Summarize: orders are sent within two days.")]
    spent = 0
    with ai_tokens(user, 1_000, "Ask", "chat") as hold:
        for _ in range(2):
            with spending_from(hold.hold):
                spent += model.complete(question, max_completion_tokens=100).total_tokens
    assert host.used(user) == spent > 0
    assert host.value("SELECT count(*) FROM trueup.charge") == 2
    assert balance(host, user) == (spent, 0)
    assert_true(host)


def test_an_async_block_does_the_same_without_blocking_the_loop(host: Host, user: int) -> None:
    async def work() -> None:
        async with ai_tokens(user, 1_000) as hold:
            await hold.acharge(prompt_tokens=200, completion_tokens=100, model_name="m")
            assert await hold.aextend(500)
            assert hold.tokens_left == 1_200
        with pytest.raises(TokensDenied):
            async with ai_tokens(user, 10_000):
                pytest.fail("it ran")

    asyncio.run(work())
    assert (host.used(user), balance(host, user)) == (300, (300, 0))
    assert_true(host)


class _ClosedBeforeCharged(ThreadPoolExecutor):
    """Runs the second piece of work, the charge, after the third, which closes the block."""

    def __init__(self) -> None:
        super().__init__(3)
        self._numbers, self._closed = itertools.count(1), threading.Event()

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        number = next(self._numbers)

        def run() -> Any:
            if number == 2:
                assert self._closed.wait(DEADLINE_SECONDS)
            try:
                return work(*args, **kwargs)
            finally:
                if number == 3:
                    self._closed.set()

        return super().submit(run)


def test_a_charge_is_recorded_even_if_its_caller_is_cancelled_and_the_block_ends_first(
    host: Host, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The block waits so long for the charge, which comes only after it.
    monkeypatch.setattr(token_hold, "RECORDING_SECONDS", 0.5)

    async def work() -> None:
        asyncio.get_running_loop().set_default_executor(_ClosedBeforeCharged())
        async with ai_tokens(user, 1_000) as hold:
            charging = asyncio.create_task(hold.acharge(prompt_tokens=200, completion_tokens=100, model_name="m"))
            await asyncio.sleep(0)  # it begins
            charging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await charging

    asyncio.run(work())
    assert (host.used(user), balance(host, user), statuses()) == (300, (300, 0), ["released"])
    assert_true(host)


def test_an_error_of_the_work_of_a_cancelled_caller_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        assert go_on.wait(DEADLINE_SECONDS)
        raise LookupError("the figures")

    async def work() -> None:
        waiting = asyncio.create_task(in_thread(fail))
        await asyncio.sleep(0)  # let it begin
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        while not caplog.records:
            await asyncio.sleep(0.01)

    go_on = threading.Event()
    asyncio.run(asyncio.wait_for(work(), DEADLINE_SECONDS))
    assert "cancelled caller" in caplog.text
    assert "LookupError: the figures" in caplog.text


def test_a_caller_that_is_cancelled_while_its_hold_is_opened_leaves_none_open(host: Host, user: int) -> None:
    with ai_tokens(user, 1):
        pass  # creates a balance that can be locked

    async def work() -> None:
        with locked_balance(host, user) as session:
            entering = asyncio.create_task(enter())
            await asyncio.to_thread(wait_for_lock, host)
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            session.execute(text("ROLLBACK"))
        while statuses() != ["released", "released"]:
            await asyncio.sleep(0.01)

    async def enter() -> None:
        async with ai_tokens(user, 1_000):
            pytest.fail("it ran")

    asyncio.run(asyncio.wait_for(work(), DEADLINE_SECONDS))
    assert balance(host, user) == (0, 0)


def test_a_cancelled_block_releases_its_tokens(host: Host, user: int) -> None:
    async def work() -> None:
        async with ai_tokens(user, 1_000):
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())
    assert (balance(host, user), statuses()) == ((0, 0), ["released"])


def test_the_charge_of_a_cancelled_caller_is_recorded_before_its_block_ends(host: Host, user: int) -> None:
    """Its provider has answered, so its tokens must not be released before they are charged."""

    async def view() -> None:
        async with ai_tokens(user, 1_500) as hold:
            with locked_balance(host, user):
                charge = asyncio.create_task(hold.acharge(prompt_tokens=200, completion_tokens=100, model_name="m"))
                await asyncio.to_thread(wait_for_lock, host)
                charge.cancel()
                await asyncio.wait([charge])
                assert charge.cancelled()

    asyncio.run(view())
    assert (balance(host, user), host.used(user)) == ((300, 0), 300)
    assert host.value("SELECT late FROM trueup.charge") is False
