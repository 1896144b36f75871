import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Connection

from ai.metering import MeteredModel, spending_from
from ai.model import Completion, Message
from billing.errors import HoldExhaustedError, NoHoldError, ProviderError, ServiceUnavailableError
from billing.holds import Hold, close_hold, open_hold
from billing.settings import get_settings
from tests.support.host import Host

PROMPT = [Message(role="user", content="a question")]


class Counting:
    """A provider that sells completions of a fixed price, and remembers what it was asked for."""

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


def hold(connection: Connection, user: int, *, tokens: int = 200, task_id: str | None = None) -> Hold:
    return open_hold(
        connection,
        user_id=user,
        task_id=task_id or str(uuid.uuid4()),
        feature_name="Test",
        section="chat",
        estimated_tokens=tokens,
        owner="test",
        lease_seconds=60,
    )


def model(provider: Any) -> MeteredModel:
    return MeteredModel(provider, get_settings())


def test_a_call_may_cost_at_most_what_the_hold_has_left(host: Host, connection: Connection) -> None:
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


def test_without_a_hold_nothing_is_sent(host: Host) -> None:
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


def test_a_provider_that_bills_more_than_asked_is_recorded_in_full(
    host: Host, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    user, provider = host.subscriber(1_000), Counting(billed=500)
    with spending_from(hold(connection, user, tokens=200)):
        model(provider).complete(PROMPT)
        with pytest.raises(HoldExhaustedError):
            model(provider).complete(PROMPT)
    assert host.used(user) == 540
    assert "340 tokens over its hold" in caplog.text


def test_a_second_attempt_gets_the_paid_answer_and_buys_only_what_is_new(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    first, second = Counting(), Counting()
    with spending_from(hold(connection, user, task_id=task_id)):
        paid = model(first).complete(PROMPT)
    with spending_from(hold(connection, user, task_id=task_id)):
        client = model(second)
        assert client.complete(PROMPT) == paid
        client.complete([Message(role="user", content="another question")])
    assert len(second.limits) == 1
    assert host.used(user) == 140


def test_a_changed_request_at_the_same_place_is_a_new_call(host: Host, connection: Connection) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    with spending_from(hold(connection, user, task_id=task_id)):
        model(Counting()).complete(PROMPT)
    with spending_from(hold(connection, user, task_id=task_id)):
        model(Counting()).complete([Message(role="user", content="changed")])
    assert host.used(user) == 140


@pytest.mark.parametrize(
    ("variable", "value"), [("TRUEUP_STORE_ANSWERS", "false"), ("TRUEUP_STORED_ANSWER_MAX_BYTES", "10")]
)
def test_answers_are_kept_only_as_far_as_the_settings_allow(
    variable: str, value: str, host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    get_settings.cache_clear()
    user = host.subscriber(1_000)
    with spending_from(hold(connection, user)):
        model(Counting()).complete(PROMPT)
    assert host.value("SELECT count(*) FROM trueup.charge WHERE answer IS NULL") == 1


def test_usage_that_can_not_be_written_is_an_error_and_never_ignored(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ai.metering.CHARGE_RETRY_DELAYS_SECONDS", (0.01,))
    user = host.subscriber(1_000)
    host.execute(
        "CREATE FUNCTION shut_down() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'terminating connection' USING ERRCODE = '57P01'; END $$"
    )
    host.execute("CREATE TRIGGER away BEFORE INSERT ON ai_usage_log EXECUTE FUNCTION shut_down()")
    with spending_from(hold(connection, user)), pytest.raises(ServiceUnavailableError, match="terminating"):
        model(Counting()).complete(PROMPT)
    assert "usage not recorded: task" in caplog.text
    assert "70 tokens" in caplog.text


def test_a_closed_hold_is_charged_late_and_in_full(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    open_ = hold(connection, user)
    with spending_from(open_):
        close_hold(connection, open_)
        model(Counting()).complete(PROMPT)
    assert host.used(user) == 70
    assert host.value("SELECT late FROM trueup.charge") is True
