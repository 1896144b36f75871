"""Each maker's own SDK and each of its formats over the metered transport, against a server with a ledger."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from google.genai import types
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import WORD, Maker
from tests.support.work import hold_tokens
from trueup import async_http_client, genai_http_options, http_client
from trueup.errors import HoldExhaustedError, NoHoldError, UnboundedCallError
from trueup.llm.running import spending_from

QUESTION = "a question"


def openai_sdk(maker: Maker, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{maker.url}/v1", api_key="test", http_client=http_client(**options))


def anthropic_sdk(maker: Maker, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=maker.url, api_key="test", http_client=http_client(**options))


def gemini_sdk(maker: Maker, **options: Any) -> genai.Client:
    http = genai_http_options(**options)
    http.base_url = maker.url
    return genai.Client(api_key="test", http_options=http)


def response(maker: Maker) -> str:
    answer = openai_sdk(maker).responses.create(model="gpt-4o-mini", input=QUESTION)
    return answer.output_text


def response_stream(maker: Maker) -> str:
    events = openai_sdk(maker).responses.create(model="gpt-4o-mini", input=QUESTION, stream=True)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def embeddings(maker: Maker) -> str:
    answer = openai_sdk(maker).embeddings.create(model="text-embedding-3-small", input=[QUESTION, "another"])
    return str(len(answer.data))


def message(maker: Maker) -> str:
    asked: Any = [{"role": "user", "content": QUESTION}]
    answer = anthropic_sdk(maker).messages.create(model="claude-test", max_tokens=20_000, messages=asked)
    return "".join(block.text for block in answer.content if block.type == "text")


def message_stream(maker: Maker) -> str:
    asked: Any = [{"role": "user", "content": QUESTION}]
    with anthropic_sdk(maker).messages.stream(model="claude-test", max_tokens=64_000, messages=asked) as events:
        return "".join(events.text_stream)


def content(maker: Maker) -> str:
    return gemini_sdk(maker).models.generate_content(model="gemini-2.5-flash", contents=QUESTION).text or ""


def content_stream(maker: Maker) -> str:
    chunks = gemini_sdk(maker).models.generate_content_stream(model="gemini-2.5-flash", contents=QUESTION)
    return "".join(chunk.text or "" for chunk in chunks)


def content_embeddings(maker: Maker) -> str:
    answer = gemini_sdk(maker).models.embed_content(model="gemini-embedding-001", contents=[QUESTION, "another"])
    return str(len(answer.embeddings or ()))


WAYS: dict[str, Callable[[Maker], str]] = {
    "openai responses": response,
    "openai responses stream": response_stream,
    "openai embeddings": embeddings,
    "anthropic messages": message,
    "anthropic messages stream": message_stream,
    "gemini": content,
    "gemini stream": content_stream,
    "gemini embeddings": content_embeddings,
}


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(1_000_000)


def charges(host: Host) -> list[int]:
    return list(host.execute("SELECT tokens_total FROM trueup.charge ORDER BY charged_at").scalars())


def metadata(host: Host) -> dict[str, Any]:
    row: dict[str, Any] = host.execute("SELECT metadata FROM ai_usage_log").scalar_one()
    return row


def cap_of(request: dict[str, Any]) -> int | None:
    config = request.get("generationConfig") or {}
    return config.get("maxOutputTokens") or request.get("max_output_tokens") or request.get("max_tokens")


@pytest.mark.parametrize("way", WAYS)
def test_a_call_is_capped_recorded_once_and_replayed(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    task = str(uuid.uuid4())
    maker.reasoning, maker.cached = (0, 0) if "embeddings" in way else (7, 4)
    with spending_from(hold_tokens(connection, user, 500, task=task)):
        first = WAYS[way](maker)
    assert first == ("2" if "embeddings" in way else WORD * 20)
    with spending_from(hold_tokens(connection, user, 500, task=task, retries=1)):
        assert WAYS[way](maker) == first
    assert len(maker.ledger) == 1
    assert charges(host) == [maker.billed]
    assert host.used(user) == maker.billed
    assert metadata(host)["usage_reported"] is True
    cap = cap_of(maker.requests[0])
    assert cap is None if "embeddings" in way else cap is not None and 0 < cap <= 500 - maker.ledger[0].prompt


ASK: Any = [{"role": "user", "content": QUESTION}]
CAPPED: dict[str, Callable[[Maker, int], object]] = {
    "openai chat": lambda maker, cap: openai_sdk(maker).chat.completions.create(
        model="gpt-4o-mini", messages=ASK, max_tokens=cap
    ),
    "openai chat, newer name": lambda maker, cap: openai_sdk(maker).chat.completions.create(
        model="gpt-4o-mini", messages=ASK, max_completion_tokens=cap
    ),
    "openai responses": lambda maker, cap: openai_sdk(maker).responses.create(
        model="gpt-4o-mini", input=QUESTION, max_output_tokens=cap
    ),
    "anthropic messages": lambda maker, cap: anthropic_sdk(maker).messages.create(
        model="claude-test", max_tokens=cap, messages=ASK
    ),
    "gemini": lambda maker, cap: gemini_sdk(maker).models.generate_content(
        model="gemini-2.5-flash", contents=QUESTION, config=types.GenerateContentConfig(max_output_tokens=cap)
    ),
}


@pytest.mark.parametrize("way", CAPPED)
def test_a_paid_call_is_replayed_although_its_cap_is_what_the_hold_has_left_now(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    task = str(uuid.uuid4())
    for retries, cap in enumerate((300, 280)):
        with spending_from(hold_tokens(connection, user, 500, task=task, retries=retries)):
            CAPPED[way](maker, cap)
    assert len(maker.ledger) == 1
    assert charges(host) == [maker.billed]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_the_hold_does_not_cover_is_refused_once_and_not_sent(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 2)), pytest.raises(HoldExhaustedError):
        WAYS[way](maker)
    with pytest.raises(NoHoldError):
        WAYS[way](maker)
    assert maker.paths == []


@pytest.mark.parametrize("way", [way for way in WAYS if "stream" not in way])
def test_an_answer_without_usage_is_estimated_and_marked(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults = ["silent"]
    with spending_from(hold_tokens(connection, user, 500)):
        WAYS[way](maker)
    assert metadata(host)["estimated"] is True
    assert abs(charges(host)[0] - maker.billed) <= 12


@pytest.mark.parametrize("way", [way for way in WAYS if "stream" in way])
def test_a_stream_that_breaks_is_charged_what_was_received(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults = ["cut"]
    maker.length = 400
    with spending_from(hold_tokens(connection, user, 5_000)), pytest.raises(Exception, match=r".") as broken:
        WAYS[way](maker)
    assert not isinstance(broken.value, AssertionError)
    assert metadata(host)["estimated"] is True
    assert maker.ledger[0].prompt < charges(host)[0] <= maker.ledger[0].prompt + 15


async def _aresponse(maker: Maker) -> str:
    async with openai.AsyncOpenAI(
        base_url=f"{maker.url}/v1", api_key="test", http_client=async_http_client()
    ) as client:
        return (await client.responses.create(model="gpt-4o-mini", input=QUESTION)).output_text


async def _amessage(maker: Maker) -> str:
    asked: Any = [{"role": "user", "content": QUESTION}]
    async with (
        anthropic.AsyncAnthropic(base_url=maker.url, api_key="test", http_client=async_http_client()) as client,
        client.messages.stream(model="claude-test", max_tokens=50, messages=asked) as events,
    ):
        return "".join([text async for text in events.text_stream])


async def _acontent(maker: Maker) -> str:
    client = gemini_sdk(maker).aio
    text = ""
    async for chunk in await client.models.generate_content_stream(model="gemini-2.5-flash", contents=QUESTION):
        text += chunk.text or ""
    await client._api_client._async_httpx_client.aclose()
    return text


@pytest.mark.parametrize("ask", [_aresponse, _amessage, _acontent])
def test_the_asynchronous_sdks_are_metered_too(
    ask: Callable[[Maker], Any], maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 500)):
        assert asyncio.run(ask(maker)) == WORD * 20
    assert charges(host) == [maker.billed]


def test_a_budget_for_thinking_stays_below_the_lowered_cap(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    ask: Any = {
        "model": "claude-test",
        "max_tokens": 20_000,
        "thinking": {"type": "enabled", "budget_tokens": 10_000},
        "messages": [{"role": "user", "content": QUESTION}],
    }
    with spending_from(hold_tokens(connection, user, 4_000)):
        anthropic_sdk(maker).messages.create(**ask)
    sent = maker.requests[0]
    assert 1_024 <= sent["thinking"]["budget_tokens"] < sent["max_tokens"] < 4_000
    with spending_from(hold_tokens(connection, user, 1_000)), pytest.raises(HoldExhaustedError, match="1025"):
        anthropic_sdk(maker).messages.create(**ask)


def test_a_thinking_budget_of_gemini_is_held_beside_the_cap(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    config = types.GenerateContentConfig(thinking_config=types.ThinkingConfig(thinking_budget=300))
    with spending_from(hold_tokens(connection, user, 1_000)):
        gemini_sdk(maker).models.generate_content(model="gemini-2.5-flash", contents=QUESTION, config=config)
    assert cap_of(maker.requests[0]) is not None
    assert (cap_of(maker.requests[0]) or 0) <= 700 - maker.ledger[0].prompt


def image(maker: Maker, **options: Any) -> Iterator[Callable[[], Any]]:
    png = b"\x89PNG"
    part = types.Part.from_bytes(data=png, mime_type="image/png")
    yield lambda: gemini_sdk(maker, **options).models.generate_content(model="gemini-2.5-flash", contents=[part])
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    asked: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    yield lambda: anthropic_sdk(maker, **options).messages.create(
        model="claude-test", max_tokens=20_000, messages=asked
    )
    items: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]
    yield lambda: openai_sdk(maker, **options).responses.create(model="gpt-4o-mini", input=items)


@pytest.mark.parametrize("place", range(3))
def test_the_provider_s_own_counter_bounds_a_prompt_with_images(
    place: int, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    call = list(image(maker))[place]
    with spending_from(hold_tokens(connection, user, 1_000)):
        call()
    assert maker.counted == 1
    assert len(maker.ledger) == 1
    assert 0 < (cap_of(maker.requests[-1]) or 0) <= 500
    assert charges(host) == [maker.billed]


@pytest.mark.parametrize("place", range(3))
def test_a_caller_s_own_bound_for_images_is_taken_without_asking(
    place: int, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    call = list(image(maker, prompt_tokens=300))[place]
    with spending_from(hold_tokens(connection, user, 1_000)):
        call()
    assert maker.counted == 0
    assert 0 < (cap_of(maker.requests[-1]) or 0) <= 700


UNBOUNDED: dict[str, dict[str, Any]] = {
    "in the background": {"background": True},
    "web_search": {"tools": [{"type": "web_search"}]},
}


@pytest.mark.parametrize("named", ["in the background", "web_search"])
def test_a_request_whose_cost_nothing_tells_is_refused_with_the_reason(
    named: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with (
        spending_from(hold_tokens(connection, user, 1_000)),
        pytest.raises(UnboundedCallError, match=named),
    ):
        openai_sdk(maker).responses.create(model="gpt-4o-mini", input=QUESTION, **UNBOUNDED[named])
    assert maker.paths == []


def test_the_makers_free_counters_pass_without_a_hold(maker: Maker, host: Host) -> None:
    asked: Any = [{"role": "user", "content": QUESTION}]
    assert anthropic_sdk(maker).messages.count_tokens(model="claude-test", messages=asked).input_tokens == 500
    assert gemini_sdk(maker).models.count_tokens(model="gemini-2.5-flash", contents=QUESTION).total_tokens == 500
