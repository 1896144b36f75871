"""Where metered clients are made and used: in tasks, threads, event loops, with either HTTP library."""

import asyncio
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import httpx2
import openai
import pytest
from celery import Celery
from sqlalchemy import Connection

import trueup
from tests.support.host import Host
from tests.support.makers import Maker
from tests.support.work import hold_tokens
from tests.support.worker import own_application
from trueup import async_http_client, http_client, metered_task
from trueup.database.engine import connect, dispose_engine
from trueup.errors import HoldExhaustedError, NoHoldError, ServiceUnavailableError
from trueup.llm.running import spending_from

ASK: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a question"}]}


@pytest.fixture
def app(database: str) -> Celery:
    return own_application()


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(100_000)


def sdk(maker: Maker, client: Any = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{maker.url}/v1", api_key="sk-test", http_client=client or http_client())


def test_a_body_without_a_model_calls_an_sdk(app: Celery, maker: Maker, host: Host, user: int) -> None:
    @metered_task(name="test.sdk", feature_name="Summaries", estimated_tokens=100)
    def summarize(user_id: int, text: str, model: str = "gpt-4o-mini") -> str:
        messages: Any = [{"role": "user", "content": text}]
        return sdk(maker).chat.completions.create(model=model, messages=messages).choices[0].message.content or ""

    assert summarize(user, text="words") == " token" * 20
    assert host.used(user) == maker.billed
    assert host.value("SELECT status FROM trueup.hold") == "settled"


def test_a_first_parameter_called_model_with_another_type_is_the_caller_s(app: Celery, host: Host, user: int) -> None:
    @metered_task(name="test.own_model", feature_name="Own model", estimated_tokens=100)
    def named(model: str, user_id: int) -> str:
        return model

    assert named("gpt-5", user) == "gpt-5"


def test_a_task_without_a_model_needs_no_provider(
    app: Celery, host: Host, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRUEUP_MODEL_PROVIDER")
    trueup_settings().cache_clear()

    @metered_task(name="test.unprovided", feature_name="Unprovided", estimated_tokens=100)
    def work(user_id: int) -> str:
        return "done"

    assert work(user) == "done"


def trueup_settings() -> Any:
    from trueup.settings.settings import get_settings

    return get_settings


def test_a_client_made_outside_of_a_task_spends_from_the_hold_that_it_is_used_in(
    maker: Maker, host: Host, connection: Connection
) -> None:
    first, second = host.subscriber(1_000), host.subscriber(1_000)
    with sdk(maker) as client:
        for user in (first, second):
            with spending_from(hold_tokens(connection, user, 100)):
                client.chat.completions.create(**ASK)
    assert host.used(first) == host.used(second) == maker.ledger[0].total


def test_threads_without_the_body_s_context_spend_from_the_hold_in_which_their_client_was_made(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: client.chat.completions.create(**ASK, max_tokens=30), range(4)))
    assert host.used(user) == maker.billed
    assert len(maker.ledger) == 4


def test_a_thread_that_outlives_the_body_cannot_spend(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 1_000)):
        client = sdk(maker)
    with pytest.raises(NoHoldError, match="after the body"):
        client.chat.completions.create(**ASK)
    assert maker.paths == []


def test_one_asynchronous_client_works_in_several_event_loops(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    client = async_http_client()

    async def ask() -> None:
        answer = await client.post(f"{maker.url}/v1/chat/completions", json=ASK)
        assert answer.status_code == 200
        await client._transport.aclose()

    with spending_from(hold_tokens(connection, user, 1_000)):
        for _ in range(2):
            asyncio.run(ask())
    assert host.used(user) == maker.billed


def test_a_cancelled_call_stays_recorded_as_one_that_may_have_been_billed(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    arrived, answer = threading.Event(), threading.Event()

    def wait(handler: Any) -> None:
        arrived.set()
        answer.wait(30)
        handler.send_json({}, 503)

    maker.other["/v1/chat/completions"] = wait

    async def ask() -> None:
        async with spending_from(hold_tokens(connection, user, 1_000)), async_http_client() as client:
            call = asyncio.create_task(client.post(f"{maker.url}/v1/chat/completions", json=ASK))
            await asyncio.to_thread(arrived.wait, 30)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            answer.set()

    asyncio.run(ask())
    assert host.value("SELECT outcome FROM trueup.call_intent") == "unknown"
    assert host.used(user) == 0


def test_the_older_http_library_is_metered_as_the_current_one(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 1_000)):
        with http_client(library="httpx") as client:
            answer = client.post(f"{maker.url}/v1/chat/completions", json=ASK)
        assert isinstance(answer, httpx.Response)

        async def stream() -> str:
            async with (
                async_http_client(library="httpx") as client,
                client.stream("POST", f"{maker.url}/v1/chat/completions", json=ASK | {"stream": True}) as answer,
            ):
                return (await answer.aread()).decode()

        assert asyncio.run(stream()).endswith("data: [DONE]\n\n")
    assert host.used(user) == maker.billed
    with pytest.raises(ValueError, match="is not known"):
        http_client(library="requests")  # type: ignore[call-overload]


def test_a_refusal_is_trueup_s_error_in_the_result_of_a_task(maker: Maker, connection: Connection, user: int) -> None:
    with spending_from(hold_tokens(connection, user, 5)), sdk(maker) as client, pytest.raises(HoldExhaustedError) as no:
        client.chat.completions.create(**ASK)
    assert isinstance(no.value, openai.OpenAIError)
    again = pickle.loads(pickle.dumps(no.value))  # noqa: S301 - our own
    assert type(again) is HoldExhaustedError
    assert str(again) == str(no.value)
    assert (type(no.value).__module__, type(no.value).__name__) == ("trueup.errors", "HoldExhaustedError")


def test_an_sdk_that_closes_its_client_leaves_the_shared_connections_open(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 1_000)):
        for _ in range(3):
            with sdk(maker) as client:
                client.chat.completions.create(**ASK)
    assert len(maker.connections) == 1


def test_the_proxy_of_the_environment_is_used(
    maker: Maker, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", maker.url)
    with spending_from(hold_tokens(connection, user, 1_000)):
        client = openai.OpenAI(base_url="http://model.example/v1", api_key="sk-test", http_client=http_client())
        maker.other["http://model.example/v1/chat/completions"] = lambda handler: handler.answer(
            "/v1/chat/completions", maker.requests[-1], None
        )
        client.chat.completions.create(**ASK)
    assert maker.paths == ["http://model.example/v1/chat/completions"]
    assert host.used(user) == maker.billed


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_caller_s_own_transport_has_read_already_is_charged(
    stream: bool, host: Host, connection: Connection, user: int
) -> None:
    usage = '"usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}'
    whole = '{"choices": [{"message": {"content": "a"}}], ' + usage + "}"
    events = 'data: {"choices": [{"delta": {"content": "a"}}], ' + usage + "}\n\ndata: [DONE]\n\n"
    kind = "text/event-stream" if stream else "application/json"
    answer = httpx2.Response(200, text=events if stream else whole, headers={"content-type": kind})
    transport = httpx2.MockTransport(lambda request: answer)
    with spending_from(hold_tokens(connection, user, 1_000)), http_client(transport=transport) as client:
        got = client.post("http://model.example/v1/chat/completions", json=ASK | {"stream": stream})
        assert host.used(user) == 10
    assert got.text == (events if stream else whole)
    assert host.value("SELECT metadata->>'usage_reported' FROM ai_usage_log") == "true"


def test_http_client_is_offered_by_the_package() -> None:
    assert {"http_client", "async_http_client", "genai_http_options"} <= set(trueup.__all__)


def test_without_the_database_nothing_is_sent_and_the_sdk_does_not_repeat(
    maker: Maker, host: Host, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Not the fixture's connection: a disposed engine closes no connection that is in use.
    with connect() as connection:
        hold = hold_tokens(connection, user, 1_000)
    with spending_from(hold), sdk(maker) as client:
        monkeypatch.setenv("TRUEUP_DATABASE_URL", f"postgresql://a:b@127.0.0.1:{port}/none")
        trueup_settings().cache_clear()
        dispose_engine()
        with pytest.raises(ServiceUnavailableError) as away:
            client.chat.completions.create(**ASK)
    assert isinstance(away.value, openai.OpenAIError)
    assert maker.paths == []


def test_an_answer_whose_charge_fails_is_not_bought_again_by_the_sdk(
    maker: Maker, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.database.retry.RETRY_DELAYS_SECONDS", (0.01,))
    host.execute(
        "CREATE FUNCTION shut_down() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'terminating connection' USING ERRCODE = '57P01'; END $$"
    )
    host.execute("CREATE TRIGGER away BEFORE INSERT ON ai_usage_log EXECUTE FUNCTION shut_down()")
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        with pytest.raises(ServiceUnavailableError):
            client.chat.completions.create(**ASK, max_tokens=30)
        with pytest.raises(ServiceUnavailableError):
            list(client.chat.completions.create(**ASK, max_tokens=30, stream=True))
        host.execute("DROP TRIGGER away ON ai_usage_log")
    assert len(maker.ledger) == 2
