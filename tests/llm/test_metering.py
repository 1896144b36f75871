import sys
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any

import httpx2
import pytest
from sqlalchemy import Connection

from tests.support.answering import Answering, prompt_of, provider_over
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS
from trueup.errors import (
    GateClosedError,
    HoldExhaustedError,
    HoldOvertakenError,
    NoHoldError,
    ProviderError,
    ServiceUnavailableError,
)
from trueup.gate.holds import Hold, close_hold, open_hold
from trueup.gate.provider_calls import list_unrecorded_calls
from trueup.llm.bounds import forget_ratios
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers.offline import offline_provider
from trueup.llm.running import spending_from
from trueup.settings.settings import get_settings

PROMPT = prompt_of(40)


def hold(connection: Connection, user: int, *, tokens: int = 200, task_id: str | None = None, retries: int = 0) -> Hold:
    return open_hold(
        connection,
        user_id=user,
        task_id=task_id or str(uuid.uuid4()),
        feature_name="Test",
        section="chat",
        estimated_tokens=tokens,
        owner="test",
        lease_seconds=60,
        retries=retries,
        ttl_seconds=600,
    )


def model(server: httpx2.BaseTransport) -> MeteredModel:
    return MeteredModel(lambda: provider_over(server))


def offline() -> MeteredModel:
    return MeteredModel(offline_provider)


def test_a_call_may_cost_at_most_the_remaining_tokens_of_the_hold(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(1_000), Answering()
    client = model(provider)
    with spending_from(hold(connection, user, tokens=200)):
        client.complete(PROMPT)
        assert client.tokens_left == 130
        client.complete(PROMPT)
        client.complete(PROMPT, max_completion_tokens=5)
    assert provider.caps == [200 - 40, 130 - 40, 5]
    assert host.used(user) == 210


def test_a_prompt_that_leaves_no_room_for_an_answer_is_not_sent(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(1_000), Answering()
    with (
        spending_from(hold(connection, user, tokens=200)),
        pytest.raises(HoldExhaustedError, match="200 tokens are left"),
    ):
        model(provider).complete(prompt_of(200))
    assert provider.caps == []


def test_a_call_without_a_hold_is_not_sent(host: Host) -> None:
    provider = Answering()
    with pytest.raises(NoHoldError):
        model(provider).complete(PROMPT)
    assert provider.caps == []


def test_a_failing_provider_charges_nothing(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    provider = Answering(status=503)
    with spending_from(hold(connection, user)), pytest.raises(ProviderError, match="out of order"):
        model(provider).complete(PROMPT)
    assert host.used(user) == 0


def test_usage_above_the_requested_limit_is_charged_in_full(
    host: Host, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    user, provider = host.subscriber(1_000), Answering(billed=500)
    with spending_from(hold(connection, user, tokens=200)):
        model(provider).complete(PROMPT)
        with pytest.raises(HoldExhaustedError):
            model(provider).complete(PROMPT)
    assert host.used(user) == 540
    assert "tokens_over=340" in caplog.text


def test_a_second_attempt_replays_paid_answers_and_buys_only_new_ones(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    first, second = Answering(), Answering()
    with spending_from(hold(connection, user, task_id=task_id)):
        paid = model(first).complete(PROMPT)
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        client = model(second)
        assert client.complete(PROMPT) == paid
        client.complete(prompt_of(50))
    assert len(second.caps) == 1
    assert host.used(user) == 70 + 80


def test_a_changed_call_is_a_new_call(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        model(Answering()).complete(PROMPT)
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        model(Answering()).complete(prompt_of(50))
    assert host.used(user) == 70 + 80


@pytest.mark.parametrize(
    ("variable", "value"), [("TRUEUP_STORE_ANSWERS", "false"), ("TRUEUP_STORED_ANSWER_MAX_BYTES", "10")]
)
def test_answers_are_stored_only_if_the_settings_allow(
    variable: str, value: str, host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    get_settings.cache_clear()
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        model(Answering()).complete(PROMPT)
    assert host.value("SELECT count(*) FROM trueup.charge WHERE answer IS NULL") == 1


def test_usage_that_cannot_be_recorded_is_an_error(
    host: Host, connection: Connection, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr("trueup.database.retry.RETRY_DELAYS_SECONDS", (0.01,))
    user = host.subscriber(1_000)
    host.execute(
        "CREATE FUNCTION shut_down() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'terminating connection' USING ERRCODE = '57P01'; END $$"
    )
    host.execute("CREATE TRIGGER away BEFORE INSERT ON ai_usage_log EXECUTE FUNCTION shut_down()")
    with spending_from(hold(connection, user)), pytest.raises(ServiceUnavailableError, match="terminating"):
        model(Answering()).complete(PROMPT)
    assert "usage not recorded: user" in caplog.text
    assert "70 tokens" in caplog.text


def test_a_hold_that_ends_during_the_call_is_charged_late_and_in_full(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    with spending_from(open_):
        model(Answering(happens=lambda asked: close_hold(connection, open_))).complete(PROMPT)
        with pytest.raises(HoldOvertakenError):
            model(Answering()).complete(PROMPT)
    assert host.used(user) == 70
    assert host.value("SELECT late FROM trueup.charge") is True


def test_an_overtaken_attempt_cannot_spend(host: Host, connection: Connection) -> None:
    user, task_id, slow = host.subscriber(1_000), str(uuid.uuid4()), Answering()
    with spending_from(hold(connection, user, task_id=task_id)):
        hold(connection, user, task_id=task_id, retries=1)
        with pytest.raises(HoldOvertakenError, match="a later attempt took over"):
            model(slow).complete(PROMPT)
    assert slow.caps == []


def test_a_call_that_two_attempts_bought_is_recorded_twice(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())

    def buy_as_the_next_attempt(asked: object) -> None:
        with spending_from(hold(connection, user, task_id=task_id, retries=1)):
            model(Answering()).complete(PROMPT)

    with spending_from(hold(connection, user, task_id=task_id)):
        model(Answering(happens=buy_as_the_next_attempt)).complete(PROMPT)
    assert host.used(user) == 140
    assert host.value("SELECT count(*) FROM trueup.charge") == 2


def test_concurrent_calls_share_the_hold(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    inner = Answering()

    def call_beside(asked: object) -> None:
        with pytest.raises(HoldExhaustedError):
            model(inner).complete(PROMPT)

    with spending_from(hold(connection, user, tokens=200)):
        model(Answering(happens=call_beside)).complete(PROMPT)
    assert inner.caps == []


@pytest.mark.parametrize("unknown", [True, False])
def test_a_call_with_an_unknown_outcome_stays_recorded(unknown: bool, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    provider = Answering(status=500 if unknown else 503)
    with spending_from(open_), pytest.raises(ProviderError):
        model(provider).complete(PROMPT)
    bounds = [call.tokens_bound for call in list_unrecorded_calls(connection)]
    assert bounds == ([200] if unknown else [])


def test_a_call_without_an_outcome_is_listed_once_its_hold_has_ended(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    with spending_from(open_), pytest.raises(SystemExit):
        model(Answering(happens=lambda asked: sys.exit())).complete(PROMPT, max_completion_tokens=60)
    assert list_unrecorded_calls(connection) == []
    close_hold(connection, open_)
    [call] = list_unrecorded_calls(connection)
    assert (call.user_id, call.task_id, call.tokens_bound) == (user, open_.task_id, 100)


def test_a_hold_is_extended_as_far_as_the_budget_allows(host: Host, connection: Connection) -> None:
    user = host.subscriber(500)
    with spending_from(hold(connection, user, tokens=200)):
        client = model(Answering())
        assert client.extend(300)
        assert client.tokens_left == 500
        assert not client.extend(1)
        client.complete(PROMPT)
        assert client.tokens_left == 430
    assert host.value("SELECT held FROM trueup.balance") == 430


def test_a_stream_is_charged_when_it_ends(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        stream = offline().stream(PROMPT, max_completion_tokens=20)
        text = "".join(stream)
        assert stream.completion().text == text
    assert host.used(user) == stream.completion().total_tokens > 0


def test_a_stream_closed_early_is_charged_for_the_received_part(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        with offline().stream(PROMPT) as stream:
            next(stream)
        assert not stream.exhausted
    assert host.used(user) == stream.completion().total_tokens > 0
    assert host.value("SELECT count(*) FROM trueup.call_intent") == 0


def test_a_stream_that_the_body_leaves_open_is_charged_when_the_body_ends(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        next(offline().stream(PROMPT))
    assert host.used(user) > 0
    assert host.value("SELECT count(*) FROM trueup.charge WHERE answer IS NULL") == 1


def test_a_paid_stream_is_replayed_whole_to_a_redelivery(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        first = "".join(offline().stream(PROMPT))
    used = host.used(user)
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        assert "".join(offline().stream(PROMPT)) == first
    assert host.used(user) == used


def in_threads(client: MeteredModel, questions: Sequence[str], *, threads: int = 8) -> list[str]:
    """Ask all questions from threads that run in copies of this context. Returns the answers, in the same order."""

    def ask(question: str) -> str:
        return client.complete([Message(role="user", content=question)], max_completion_tokens=10).text

    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(copy_context().run, ask, text) for text in questions]]


class Echo(Answering):
    """Answers each question by its text, so that an answer shows which question it belongs to."""

    def text(self, question: str) -> str:
        return f"answer to {question}"


def test_calls_in_threads_are_replayed_whatever_thread_comes_first(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(10_000), str(uuid.uuid4())
    # The same question twice is two calls.
    questions = [*(f"question {number}" for number in range(9)), "question 0"]
    with spending_from(hold(connection, user, tokens=5_000, task_id=task_id)):
        first = in_threads(model(Echo(billed=10)), questions)
    second, used = Echo(billed=10), host.used(user)
    with spending_from(hold(connection, user, tokens=5_000, task_id=task_id, retries=1)):
        again = in_threads(model(second), questions[::-1])
    assert first == again[::-1] == [f"answer to {question}" for question in questions]
    assert second.caps == []
    assert host.used(user) == used > 0
    assert host.value("SELECT count(*) FROM trueup.charge") == 10


def test_threads_together_spend_no_more_than_the_hold(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(10_000), Answering(billed=10)

    def ask(number: int) -> bool:
        try:
            client.complete(PROMPT, max_completion_tokens=10)
        except HoldExhaustedError:
            return False
        return True

    client = model(provider)
    with spending_from(hold(connection, user, tokens=250)), ThreadPoolExecutor(8) as pool:
        done = [future.result() for future in [pool.submit(copy_context().run, ask, n) for n in range(16)]]
    assert done.count(True) == len(provider.caps) <= 5
    assert host.used(user) == 50 * len(provider.caps)


def test_tokens_that_another_threads_failed_call_leaves_can_be_spent(host: Host, connection: Connection) -> None:
    """The last answer of the database was given while that call was in flight, and it knew of fewer tokens."""
    user, provider, failing = host.subscriber(1_000), Answering(), Answering(status=503)
    with spending_from(hold(connection, user, tokens=200)) as running:
        with pytest.raises(ProviderError):
            model(failing).complete(PROMPT)
        running.tokens_left = 0
        model(provider).complete(PROMPT)
    assert provider.caps == [160]


def test_a_call_that_failed_unbilled_is_found_by_its_number_after_a_redelivery(
    host: Host, connection: Connection
) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        with pytest.raises(ProviderError):
            model(Answering(status=503)).complete(PROMPT)
        paid = model(Answering()).complete(PROMPT)
    second = Answering()
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        assert model(second).complete(PROMPT) == paid
    assert second.caps == []


def test_a_call_that_was_not_sent_leaves_its_number_to_the_next_one(host: Host, connection: Connection) -> None:
    """A redelivery, in which the first try succeeds, else buys the answer again."""
    forget_ratios()
    user, task_id = host.subscriber(10_000), str(uuid.uuid4())
    first, second = Answering(), Answering()
    with spending_from(hold(connection, user, tokens=2_000, task_id=task_id)):
        client = MeteredModel(lambda: provider_over(first, model_name="llama"))
        host.execute("ALTER TABLE trueup.prompt_ratio RENAME TO away")  # what was learned of the model can't be read
        with pytest.raises(GateClosedError):
            client.complete(PROMPT)
        host.execute("ALTER TABLE trueup.away RENAME TO prompt_ratio")
        paid = client.complete(PROMPT)
    with spending_from(hold(connection, user, tokens=2_000, task_id=task_id, retries=1)):
        assert MeteredModel(lambda: provider_over(second, model_name="llama")).complete(PROMPT) == paid
    assert (len(first.caps), second.caps) == (1, [])


def test_a_thread_that_the_body_left_behind_cannot_spend(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(1_000), Answering()
    with spending_from(hold(connection, user)):
        behind = copy_context()
    with pytest.raises(NoHoldError, match="after the body of task"):
        behind.run(model(provider).complete, PROMPT)
    assert provider.caps == []


@pytest.mark.parametrize("way", ["complete", "stream"])
def test_a_hold_ends_after_the_calls_that_the_bodys_threads_have_begun(
    host: Host, connection: Connection, way: str
) -> None:
    """The hold covers them. Released before, its tokens would be spent twice."""
    begun, answered = threading.Event(), threading.Event()

    def answer_later(asked: object) -> None:
        begun.set()
        answered.wait(DEADLINE_SECONDS)

    user = host.subscriber(1_000)
    opened = hold(connection, user)

    def body() -> None:
        with spending_from(opened):
            calls.append(pool.submit(copy_context().run, getattr(model(Answering(happens=answer_later)), way), PROMPT))
            assert begun.wait(DEADLINE_SECONDS)
        close_hold(connection, opened)

    calls: list[Future[Any]] = []
    with ThreadPoolExecutor(2) as pool:
        ended = pool.submit(body)
        assert begun.wait(DEADLINE_SECONDS)
        wait([ended], 0.5)  # without the rule the body ends at once
        answered.set()
        ended.result(DEADLINE_SECONDS)
        calls[0].result(DEADLINE_SECONDS)
    assert host.execute("SELECT late, tokens_total > 0 FROM trueup.charge").all() == [(False, True)]
    assert host.value("SELECT status FROM trueup.hold WHERE user_id = :user", user=user) == "settled"
