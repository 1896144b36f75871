"""OpenAI's own SDK over the metered transport, against a server with a ledger."""

import asyncio
import gc
import uuid
from typing import Any

import openai
import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import Maker
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.work import hold_tokens
from trueup import async_http_client, http_client
from trueup.errors import HoldExhaustedError, NoHoldError, UnboundedCallError, UnmeteredCallError
from trueup.gate.provider_calls import list_unrecorded_calls
from trueup.llm.running import spending_from

ASK: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a question"}]}


def sdk(maker: Maker, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{maker.url}/v1", api_key="sk-test", http_client=http_client(**options))


def async_sdk(maker: Maker, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{maker.url}/v1", api_key="sk-test", http_client=async_http_client(**options))


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(100_000)


def charges(host: Host) -> list[int]:
    return list(host.execute("SELECT tokens_total FROM trueup.charge ORDER BY charged_at").scalars())


def metadata(host: Host) -> list[dict[str, Any]]:
    return list(host.execute("SELECT metadata FROM ai_usage_log ORDER BY created_at").scalars())


def test_a_call_is_capped_to_the_hold_and_recorded_once(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 30)) as running, sdk(maker) as client:
        answer = client.chat.completions.create(**ASK)
        left = running.tokens_left
    line = maker.ledger[0]
    assert maker.requests[0]["max_tokens"] == 30 - line.prompt
    assert answer.usage.total_tokens == line.total == host.used(user)  # type: ignore[union-attr]
    assert left == 30 - line.total
    assert metadata(host)[0]["usage_reported"] is True


@pytest.mark.parametrize("way", ["complete", "stream"])
def test_an_asynchronous_client_does_the_same(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    async def ask() -> None:
        async with spending_from(hold_tokens(connection, user, 40)), async_sdk(maker) as client:
            if way == "complete":
                await client.chat.completions.create(**ASK)
            else:
                async for _ in await client.chat.completions.create(**ASK, stream=True):
                    pass

    asyncio.run(ask())
    assert charges(host) == [maker.billed]
    assert maker.requests[0]["max_tokens"] == 40 - maker.ledger[0].prompt


def test_a_caller_s_own_cap_is_kept_if_the_hold_covers_it_and_lowered_if_not(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 100)), sdk(maker) as client:
        client.chat.completions.create(**ASK, max_completion_tokens=5)
        client.chat.completions.create(**ASK, max_completion_tokens=5_000)
        client.chat.completions.create(**ASK, max_tokens=3, n=2)
    small, large, several = maker.requests
    assert small["max_completion_tokens"] == 5
    assert large["max_completion_tokens"] == 100 - maker.ledger[0].total - maker.ledger[1].prompt
    assert several["max_tokens"] == 3
    assert host.used(user) == maker.billed <= 100


def test_several_answers_share_what_the_hold_covers(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 50)), sdk(maker) as client:
        client.chat.completions.create(**ASK, n=3)
    assert maker.requests[0]["max_tokens"] == (50 - maker.ledger[0].prompt) // 3
    assert host.used(user) == maker.billed <= 50


@pytest.mark.parametrize("asks", [True, False])
def test_a_stream_is_passed_on_unchanged_with_its_usage_only_if_asked_for(
    asks: bool, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if asks else {}
    bare = openai.OpenAI(base_url=f"{maker.url}/v1", api_key="sk-test")
    with bare:
        plain = list(bare.chat.completions.create(**ASK, stream=True, max_tokens=50, **options))
    maker.ledger.clear()
    with spending_from(hold_tokens(connection, user, 100)), sdk(maker) as client:
        metered = list(client.chat.completions.create(**ASK, stream=True, max_tokens=50, **options))
        assert charges(host) == [maker.billed]
    assert maker.requests[1]["stream_options"] == {"include_usage": True}
    assert [event.choices for event in metered] == [event.choices for event in plain]
    assert [event.usage for event in metered] == [event.usage for event in plain]
    assert all(event.choices for event in metered) is not asks


@pytest.mark.parametrize("way", ["close", "break", "drop", "never iterated"])
def test_a_stream_that_is_not_read_to_its_end_is_charged_an_estimate_of_what_was_streamed(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.length, maker.pause_after = 500, 9
    with spending_from(hold_tokens(connection, user, 2_000)), sdk(maker) as client:
        stream: Any = client.chat.completions.create(**ASK, stream=True)
        if way != "never iterated":
            for number, _ in enumerate(stream):
                if number == 8:
                    break
        if way == "close":
            stream.close()
        elif way == "drop":
            del stream
            gc.collect()
    words = 0 if way == "never iterated" else 8
    assert charges(host) == [maker.ledger[0].prompt + words]
    assert metadata(host)[0]["estimated"] is True
    assert metadata(host)[0]["usage_reported"] is False
    assert not host.value("SELECT count(*) FROM trueup.call_intent")


def test_a_connection_that_breaks_in_a_stream_is_charged_an_estimate_and_raises(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults, maker.length = ["cut"], 500
    with (
        spending_from(hold_tokens(connection, user, 2_000)),
        sdk(maker) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        list(client.chat.completions.create(**ASK, stream=True))
    assert 0 < charges(host)[0] < 60
    assert metadata(host)[0]["estimated"] is True


def test_usage_that_a_server_does_not_report_is_estimated_and_marked(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults = ["silent", "silent"]
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        client.chat.completions.create(**ASK)
        list(client.chat.completions.create(**ASK, stream=True))
    assert all(abs(charge - maker.ledger[0].total) <= 4 for charge in charges(host))
    assert [row["estimated"] for row in metadata(host)] == [True, True]


def test_a_server_that_refuses_to_report_a_stream_s_usage_is_asked_without(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    refusal = {"error": {"message": "Unknown parameter: stream_options"}}

    def refuse(handler: Any) -> None:
        if "stream_options" in maker.requests[-1]:
            handler.send_json(refusal, 400)
        else:
            handler.answer("/v1/chat/completions", maker.requests[-1], None)

    maker.other["/v1/chat/completions"] = refuse
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        for _ in range(2):
            assert len(list(client.chat.completions.create(**ASK, stream=True))) == 22
    assert ["stream_options" in request for request in maker.requests] == [True, False, False]
    assert len(charges(host)) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_redelivery_gets_the_paid_answers_again_whatever_comes_first(
    stream: bool, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    task = str(uuid.uuid4())

    def ask(client: openai.OpenAI, text: str) -> str:
        messages: Any = [{"role": "user", "content": text}]
        if stream:
            parts = client.chat.completions.create(model="gpt-4o-mini", messages=messages, stream=True)
            return "".join(part.choices[0].delta.content or "" for part in parts)
        return client.chat.completions.create(model="gpt-4o-mini", messages=messages).choices[0].message.content or ""

    with spending_from(hold_tokens(connection, user, 1_000, task=task)), sdk(maker) as client:
        first = [ask(client, text) for text in ("one", "two", "one")]
    with spending_from(hold_tokens(connection, user, 1_000, task=task, retries=1)), sdk(maker) as client:
        again = [ask(client, text) for text in ("two", "one", "one", "three")]
    assert again[:3] == [first[1], first[0], first[2]]
    assert len(maker.ledger) == 4
    assert host.used(user) == maker.billed


def test_a_long_stream_is_stored_compressed_and_replayed(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    task = str(uuid.uuid4())
    maker.length = 1_500  # about 250 kB of events
    heard = []
    for retries in range(2):
        with spending_from(hold_tokens(connection, user, 5_000, task=task, retries=retries)), sdk(maker) as client:
            heard.append([part.choices for part in client.chat.completions.create(**ASK, stream=True)])
    assert len(heard[0]) == 1_502
    assert heard[0] == heard[1]
    assert len(maker.ledger) == 1
    assert host.value("SELECT length(answer::text) FROM trueup.charge") < 65_536


def test_a_call_that_was_asked_again_after_an_unknown_outcome_is_replayed(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    task = str(uuid.uuid4())
    maker.faults = ["reset"]
    for retries in range(2):
        with spending_from(hold_tokens(connection, user, 1_000, task=task, retries=retries)), sdk(maker) as client:
            client.chat.completions.create(**ASK)
    assert len(maker.ledger) == 1
    assert charges(host) == [maker.billed]


def test_each_attempt_of_the_sdk_is_a_call_and_only_the_served_one_is_charged(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults = [429, "reset"]
    hold = hold_tokens(connection, user, 1_000)
    with spending_from(hold), sdk(maker) as client:
        client.with_options(max_retries=2).chat.completions.create(**ASK)
    assert [head["x-stainless-retry-count"] for head in maker.headers] == ["0", "1", "2"]
    assert charges(host) == [maker.billed]
    unknown = list_unrecorded_calls(connection)
    assert [call.tokens_bound for call in unknown] == [1_000]


@pytest.mark.parametrize(("status", "unknown"), [(400, 0), (429, 0), (503, 0), (500, 1), (504, 1)])
def test_a_refused_call_costs_nothing_and_a_server_s_failure_stays_recorded(
    status: int, unknown: int, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults = [status]
    with (
        spending_from(hold_tokens(connection, user, 1_000)),
        sdk(maker) as client,
        pytest.raises(openai.APIStatusError),
    ):
        client.with_options(max_retries=0).chat.completions.create(**ASK)
    assert charges(host) == []
    assert len(list_unrecorded_calls(connection)) == unknown


def test_a_call_that_the_hold_does_not_cover_is_not_sent_and_not_repeated(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 5)), sdk(maker) as client:
        with pytest.raises(HoldExhaustedError, match="5 tokens are left of the hold") as refused:
            client.chat.completions.create(**ASK)
        assert isinstance(refused.value, openai.OpenAIError)
    assert maker.paths == []


def test_outside_a_hold_paid_calls_are_refused_and_free_ones_pass(maker: Maker, host: Host) -> None:
    with sdk(maker) as client:
        with pytest.raises(NoHoldError):
            client.chat.completions.create(**ASK)
        client.models.list()
    assert maker.paths == ["/v1/models"]


def test_a_path_that_no_format_describes_is_refused_unless_it_is_allowed(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.other["/v1/audio/speech"] = lambda handler: handler.send_json({})
    speech: Any = {"model": "tts-1", "voice": "alloy", "input": "text"}
    with spending_from(hold_tokens(connection, user, 1_000)):
        with sdk(maker) as client, pytest.raises(UnmeteredCallError, match="/v1/audio/speech"):
            client.audio.speech.create(**speech)
        assert maker.paths == []
        with sdk(maker, allow=["/audio/speech"]) as client:
            client.audio.speech.create(**speech)
    assert maker.paths == ["/v1/audio/speech"]


@pytest.mark.parametrize(
    "path", ["/V1//Chat/Completions/", "/v1/./chat%2Fcompletions", "/gateway/eu/openai/chat/completions"]
)
def test_a_path_in_disguise_is_metered(path: str, maker: Maker, host: Host, connection: Connection, user: int) -> None:
    with spending_from(hold_tokens(connection, user, 100)), http_client() as client:
        client.post(maker.url + path, json=ASK)
    assert len(maker.requests) == 1
    assert maker.requests[0]["max_tokens"] < 100


def test_images_need_a_bound_of_the_caller_s(maker: Maker, host: Host, connection: Connection, user: int) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    ask: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": image}]}
    with spending_from(hold_tokens(connection, user, 1_000)):
        with sdk(maker) as client:
            with pytest.raises(UnboundedCallError, match="image_url"):
                client.chat.completions.create(**ask)
            client.chat.completions.create(**ask, extra_headers={"trueup-prompt-tokens": "300"})
        with sdk(maker, prompt_tokens=200) as client:
            client.chat.completions.create(**ask)
    assert 1_000 - 300 - 20 < maker.requests[0]["max_tokens"] <= 1_000 - 300
    assert "trueup-prompt-tokens" not in maker.headers[0]
    assert len(charges(host)) == 2


def test_tools_and_schemas_count_as_prompt(maker: Maker, host: Host, connection: Connection, user: int) -> None:
    tool: Any = {"type": "function", "function": {"name": "find", "description": "word " * 100, "parameters": {}}}
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        client.chat.completions.create(**ASK, tools=[tool])
    assert maker.requests[0]["max_tokens"] < 900


def test_a_stream_that_outlives_its_hold_is_charged_at_the_end_and_passes_nothing_more(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.length, maker.pause_after = 500, 6
    with sdk(maker) as client:
        with spending_from(hold_tokens(connection, user, 2_000)):
            stream = client.chat.completions.create(**ASK, stream=True)
            for _ in range(5):
                next(stream)
        assert len(charges(host)) == 1
        maker.resume.set()
        with pytest.raises(Exception, match=r"ended|closed|Bad file|read"):
            list(stream)
    wait_for(maker.left.is_set, "the connection was closed", seconds=DEADLINE_SECONDS)
    assert len(charges(host)) == 1
