import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS
from trueup.errors import (
    HoldExhaustedError,
    HoldOvertakenError,
    NoHoldError,
    ProviderError,
    ServiceUnavailableError,
)
from trueup.gate.holds import Hold, close_hold, open_hold
from trueup.gate.provider_calls import list_unrecorded_calls
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Completion, CompletionStream, Message
from trueup.llm.offline.offline import OfflineProvider
from trueup.llm.running import spending_from
from trueup.settings.settings import get_settings

PROMPT = [Message(role="user", content="a question")]


class Counting:
    """A provider whose completions have a fixed usage. It records the limits of its calls."""

    def __init__(self, *, prompt_tokens: int = 40, billed: int = 30, error: Exception | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self.billed = billed
        self.error = error
        self.limits: list[int] = []

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        return self.prompt_tokens

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        self.limits.append(max_completion_tokens)
        if self.error:
            raise self.error
        return Completion(
            text=f"answer {len(self.limits)}",
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.billed,
            total_tokens=self.prompt_tokens + self.billed,
            model_name="counting",
            response_time_ms=5,
        )


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


def model(provider: Any) -> MeteredModel:
    return MeteredModel(lambda: provider, get_settings())


def test_a_call_may_cost_at_most_the_remaining_tokens_of_the_hold(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(1_000), Counting()
    client = model(provider)
    with spending_from(hold(connection, user, tokens=200)):
        client.complete(PROMPT)
        assert client.tokens_left == 130
        client.complete(PROMPT)
        client.complete(PROMPT, max_completion_tokens=5)
    assert provider.limits == [200 - 40, 130 - 40, 5]
    assert host.used(user) == 210


def test_a_prompt_that_leaves_no_room_for_an_answer_is_not_sent(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(1_000), Counting(prompt_tokens=200)
    with (
        spending_from(hold(connection, user, tokens=200)),
        pytest.raises(HoldExhaustedError, match="200 tokens are left"),
    ):
        model(provider).complete(PROMPT)
    assert provider.limits == []


def test_a_call_without_a_hold_is_not_sent(host: Host) -> None:
    provider = Counting()
    with pytest.raises(NoHoldError):
        model(provider).complete(PROMPT)
    assert provider.limits == []


def test_a_failing_provider_charges_nothing(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    provider = Counting(error=ProviderError("out of order", retryable=True))
    with spending_from(hold(connection, user)), pytest.raises(ProviderError, match="out of order"):
        model(provider).complete(PROMPT)
    assert host.used(user) == 0


def test_usage_above_the_requested_limit_is_charged_in_full(
    host: Host, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    user, provider = host.subscriber(1_000), Counting(billed=500)
    with spending_from(hold(connection, user, tokens=200)):
        model(provider).complete(PROMPT)
        with pytest.raises(HoldExhaustedError):
            model(provider).complete(PROMPT)
    assert host.used(user) == 540
    assert "tokens_over=340" in caplog.text


def test_a_second_attempt_replays_paid_answers_and_buys_only_new_ones(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    first, second = Counting(), Counting()
    with spending_from(hold(connection, user, task_id=task_id)):
        paid = model(first).complete(PROMPT)
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        client = model(second)
        assert client.complete(PROMPT) == paid
        client.complete([Message(role="user", content="another question")])
    assert len(second.limits) == 1
    assert host.used(user) == 140


def test_a_changed_call_is_a_new_call(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        model(Counting()).complete(PROMPT)
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        model(Counting()).complete([Message(role="user", content="changed")])
    assert host.used(user) == 140


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
        model(Counting()).complete(PROMPT)
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
        model(Counting()).complete(PROMPT)
    assert "usage not recorded: user" in caplog.text
    assert "70 tokens" in caplog.text


class Interrupted(Counting):
    """A provider that runs a function during its call."""

    def __init__(self, happening: Callable[[], object]) -> None:
        super().__init__()
        self.happening = happening

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        self.happening()
        return super().complete(messages, max_completion_tokens=max_completion_tokens)


def test_a_hold_that_ends_during_the_call_is_charged_late_and_in_full(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    with spending_from(open_):
        model(Interrupted(lambda: close_hold(connection, open_))).complete(PROMPT)
        with pytest.raises(HoldOvertakenError):
            model(Counting(prompt_tokens=1)).complete(PROMPT)
    assert host.used(user) == 70
    assert host.value("SELECT late FROM trueup.charge") is True


def test_an_overtaken_attempt_cannot_spend(host: Host, connection: Connection) -> None:
    user, task_id, slow = host.subscriber(1_000), str(uuid.uuid4()), Counting()
    with spending_from(hold(connection, user, task_id=task_id)):
        hold(connection, user, task_id=task_id, retries=1)
        with pytest.raises(HoldOvertakenError, match="a later attempt took over"):
            model(slow).complete(PROMPT)
    assert slow.limits == []


def test_a_call_that_two_attempts_bought_is_recorded_twice(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())

    def buy_as_the_next_attempt() -> None:
        with spending_from(hold(connection, user, task_id=task_id, retries=1)):
            model(Counting()).complete(PROMPT)

    with spending_from(hold(connection, user, task_id=task_id)):
        model(Interrupted(buy_as_the_next_attempt)).complete(PROMPT)
    assert host.used(user) == 140
    assert host.value("SELECT count(*) FROM trueup.charge") == 2


def test_concurrent_calls_share_the_hold(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    inner = Counting()

    def call_beside() -> None:
        with pytest.raises(HoldExhaustedError):
            model(inner).complete(PROMPT)

    with spending_from(hold(connection, user, tokens=200)):
        model(Interrupted(call_beside)).complete(PROMPT)
    assert inner.limits == []


@pytest.mark.parametrize("unknown", [True, False])
def test_a_call_with_an_unknown_outcome_stays_recorded(unknown: bool, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    provider = Counting(error=ProviderError("no answer", outcome_unknown=unknown))
    with spending_from(open_), pytest.raises(ProviderError):
        model(provider).complete(PROMPT)
    bounds = [call.tokens_bound for call in list_unrecorded_calls(connection)]
    assert bounds == ([200] if unknown else [])


def test_a_call_without_an_outcome_is_listed_once_its_hold_has_ended(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    with spending_from(open_), pytest.raises(SystemExit):
        model(Counting(error=SystemExit())).complete(PROMPT, max_completion_tokens=60)  # type: ignore[arg-type]
    assert list_unrecorded_calls(connection) == []
    close_hold(connection, open_)
    [call] = list_unrecorded_calls(connection)
    assert (call.user_id, call.task_id, call.tokens_bound) == (user, open_.task_id, 100)


def test_a_hold_is_extended_as_far_as_the_budget_allows(host: Host, connection: Connection) -> None:
    user = host.subscriber(500)
    with spending_from(hold(connection, user, tokens=200)):
        client = model(Counting())
        assert client.extend(300)
        assert client.tokens_left == 500
        assert not client.extend(1)
        client.complete(PROMPT)
        assert client.tokens_left == 430
    assert host.value("SELECT held FROM trueup.balance") == 430


def test_a_stream_is_charged_when_it_ends(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        stream = model(OfflineProvider()).stream(PROMPT, max_completion_tokens=20)
        text = "".join(stream)
        assert stream.completion().text == text
    assert host.used(user) == stream.completion().total_tokens > 0


def test_a_stream_closed_early_is_charged_for_the_received_part(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        with model(OfflineProvider()).stream(PROMPT) as stream:
            next(stream)
        assert not stream.exhausted
    assert host.used(user) == stream.completion().total_tokens > 0
    assert host.value("SELECT count(*) FROM trueup.call_intent") == 0


def test_a_stream_that_the_body_leaves_open_is_charged_when_the_body_ends(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        next(model(OfflineProvider()).stream(PROMPT))
    assert host.used(user) > 0
    assert host.value("SELECT count(*) FROM trueup.charge WHERE answer IS NULL") == 1


def test_a_paid_stream_is_replayed_whole_to_a_redelivery(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        first = "".join(model(OfflineProvider()).stream(PROMPT))
    used = host.used(user)
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        assert "".join(model(OfflineProvider()).stream(PROMPT)) == first
    assert host.used(user) == used


def in_threads(client: MeteredModel, questions: Sequence[str], *, threads: int = 8) -> list[str]:
    """Ask all questions from threads that run in copies of this context. Returns the answers, in the same order."""

    def ask(question: str) -> str:
        return client.complete([Message(role="user", content=question)], max_completion_tokens=10).text

    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(copy_context().run, ask, text) for text in questions]]


class Echo(Counting):
    """Answers each question by its text, so that an answer shows which question it belongs to."""

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        answer = super().complete(messages, max_completion_tokens=max_completion_tokens)
        return replace(answer, text=f"answer to {messages[0].content}")


def test_calls_in_threads_are_replayed_whatever_thread_comes_first(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(10_000), str(uuid.uuid4())
    # The same question twice is two calls.
    questions = [*(f"question {number}" for number in range(9)), "question 0"]
    with spending_from(hold(connection, user, tokens=5_000, task_id=task_id)):
        first = in_threads(model(Echo(billed=10)), questions)
    second = Echo(billed=10)
    with spending_from(hold(connection, user, tokens=5_000, task_id=task_id, retries=1)):
        again = in_threads(model(second), questions[::-1])
    assert first == again[::-1] == [f"answer to {question}" for question in questions]
    assert second.limits == []
    assert host.used(user) == 10 * 50
    assert host.value("SELECT count(*) FROM trueup.charge") == 10


def test_threads_together_spend_no_more_than_the_hold(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(10_000), Counting(billed=10)

    def ask(number: int) -> bool:
        try:
            client.complete([Message(role="user", content=str(number))], max_completion_tokens=10)
        except HoldExhaustedError:
            return False
        return True

    client = model(provider)
    with spending_from(hold(connection, user, tokens=250)), ThreadPoolExecutor(8) as pool:
        done = [future.result() for future in [pool.submit(copy_context().run, ask, n) for n in range(16)]]
    assert done.count(True) == len(provider.limits) <= 5
    assert host.used(user) == 50 * len(provider.limits)


def test_tokens_that_another_threads_failed_call_leaves_can_be_spent(host: Host, connection: Connection) -> None:
    """The last answer of the database was given while that call was in flight, and it knew of fewer tokens."""
    user, provider, failing = host.subscriber(1_000), Counting(), Counting(error=ProviderError("out of order"))
    with spending_from(hold(connection, user, tokens=200)) as running:
        with pytest.raises(ProviderError):
            model(failing).complete(PROMPT)
        running.tokens_left = 0
        model(provider).complete(PROMPT)
    assert provider.limits == [160]


def test_a_call_that_failed_unbilled_is_found_by_its_number_after_a_redelivery(
    host: Host, connection: Connection
) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        with pytest.raises(ProviderError):
            model(Counting(error=ProviderError("busy"))).complete(PROMPT)
        paid = model(Counting()).complete(PROMPT)
    second = Counting()
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        assert model(second).complete(PROMPT) == paid
    assert second.limits == []


def test_a_call_that_was_not_sent_leaves_its_number_to_the_next_one(host: Host, connection: Connection) -> None:
    """A redelivery, in which the first try succeeds, else buys the answer again."""

    class Stumbling(Counting):
        def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
            if not stumbled.is_set():
                stumbled.set()
                raise ServiceUnavailableError("PostgreSQL", "db.example", "connection refused")
            return super().count_prompt_tokens(messages)

    stumbled, user, task_id = threading.Event(), host.subscriber(1_000), str(uuid.uuid4())
    client = model(Stumbling())
    with spending_from(hold(connection, user, task_id=task_id)):
        with pytest.raises(ServiceUnavailableError):
            client.complete(PROMPT)
        paid = client.complete(PROMPT)
    second = Counting()
    with spending_from(hold(connection, user, task_id=task_id, retries=1)):
        assert model(second).complete(PROMPT) == paid
    assert second.limits == []


def test_a_thread_that_the_body_left_behind_cannot_spend(host: Host, connection: Connection) -> None:
    user, provider = host.subscriber(1_000), Counting()
    with spending_from(hold(connection, user)):
        behind = copy_context()
    with pytest.raises(NoHoldError, match="after the body of task"):
        behind.run(model(provider).complete, PROMPT)
    assert provider.limits == []


@pytest.mark.parametrize("way", ["complete", "stream"])
def test_a_hold_ends_after_the_calls_that_the_bodys_threads_have_begun(
    host: Host, connection: Connection, way: str
) -> None:
    """The hold covers them. Released before, its tokens would be spent twice."""
    begun, answered = threading.Event(), threading.Event()

    class Slow(OfflineProvider):
        def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
            begun.set()
            answered.wait(DEADLINE_SECONDS)
            return super().complete(messages, max_completion_tokens=max_completion_tokens)

        def stream(self, messages: Sequence[Message], *, max_completion_tokens: int) -> CompletionStream:
            begun.set()
            answered.wait(DEADLINE_SECONDS)
            return super().stream(messages, max_completion_tokens=max_completion_tokens)

    user = host.subscriber(1_000)
    opened = hold(connection, user)

    def body() -> None:
        with spending_from(opened):
            calls.append(pool.submit(copy_context().run, getattr(model(Slow()), way), PROMPT))
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
