"""Streams that hold tokens: bound in each step, whatever its context, and ended once, whatever ends them."""

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.waiting import wait_for
from trueup.billing.streaming import astream_with_tokens, stream_with_tokens
from trueup.billing.token_hold import ai_tokens
from trueup.errors import NoHoldError, TokensDenied
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers.offline import offline_provider
from trueup.llm.running import running_hold, spending_from

PROMPT = [Message(role="user", content="Orders are sent in two days. Returns are free.")]
OTHER = [Message(role="user", content="Is there a shop in the city, and when is it open?")]


@pytest.fixture
def model(database: str) -> MeteredModel:
    return MeteredModel(offline_provider)


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000)


def statuses(host: Host) -> list[str]:
    return list(host.execute("SELECT status FROM trueup.hold ORDER BY id").scalars())


def two_answers(model: MeteredModel) -> Callable[[ai_tokens], Iterator[str]]:
    def chunks(_: ai_tokens) -> Iterator[str]:
        yield from model.stream(PROMPT)
        yield from model.stream(OTHER)

    return chunks


def async_answers(model: MeteredModel) -> Callable[[ai_tokens], AsyncIterator[str]]:
    async def chunks(_: ai_tokens) -> AsyncIterator[str]:
        for prompt in (PROMPT, OTHER):
            async for chunk in model.astream(prompt):
                yield chunk

    return chunks


def test_a_generator_may_end_its_hold_in_another_context(host: Host, user: int, model: MeteredModel) -> None:
    def chunks() -> Iterator[str]:
        with ai_tokens(user, 1_500) as hold, spending_from(hold.hold):
            yield from model.stream(PROMPT)

    generator = chunks()
    contextvars.copy_context().run(next, generator)
    contextvars.copy_context().run(generator.close)
    assert running_hold() is None
    assert (statuses(host), host.used(user) > 0) == (["settled"], True)


def test_a_block_that_ends_in_another_context_leaves_that_one_s_hold(host: Host, user: int) -> None:
    with ai_tokens(user, 100) as first, ai_tokens(user, 100) as second:
        block = spending_from(first.hold)
        contextvars.copy_context().run(block.__enter__)
        with spending_from(second.hold):
            block.__exit__()
            assert running_hold() == second.hold
        assert running_hold() is None


def test_an_async_block_spends_and_charges_open_streams(host: Host, user: int, model: MeteredModel) -> None:
    async def view() -> None:
        async with ai_tokens(user, 1_500) as hold, spending_from(hold.hold):
            await anext(aiter(model.astream(PROMPT)))

    asyncio.run(view())
    assert running_hold() is None
    assert (statuses(host), host.used(user) > 0) == (["settled"], True)


def test_each_step_finds_the_hold_in_any_thread_and_context(host: Host, user: int, model: MeteredModel) -> None:
    stream = stream_with_tokens(two_answers(model), user, 1_500)
    chunks: list[str] = []

    def step() -> None:
        chunks.extend(chunk for chunk in [next(stream, "")] if chunk)

    while statuses(host) == ["open"]:
        thread = threading.Thread(target=contextvars.Context().run, args=(step,))
        thread.start()
        thread.join()
    assert len(chunks) > 10
    assert running_hold() is None
    assert (statuses(host), host.value("SELECT count(*) FROM trueup.charge")) == (["settled"], 2)
    assert next(stream, None) is None
    assert_true(host)


@pytest.mark.parametrize("reader", ["async", "sync"])
def test_async_code_reads_streams_of_both_kinds(reader: str, host: Host, user: int, model: MeteredModel) -> None:
    async def view() -> list[str]:
        if reader == "async":
            stream: Any = await astream_with_tokens(async_answers(model), user, 1_500)
        else:
            stream = stream_with_tokens(two_answers(model), user, 1_500)
        # Each chunk is read by a task of its own, as `asyncio.wait_for` does before Python 3.12.
        chunks, iterator = [], aiter(stream)
        while True:
            try:
                chunks.append(await asyncio.create_task(anext(iterator)))
            except StopAsyncIteration:
                return chunks

    assert len(asyncio.run(view())) > 10
    assert (statuses(host), host.value("SELECT count(*) FROM trueup.charge")) == (["settled"], 2)
    assert_true(host)


@pytest.mark.parametrize("way", ["close", "drop", "drop on a loop", "fail"])
def test_a_stream_that_ends_early_is_charged_for_its_part(way: str, host: Host, user: int, model: MeteredModel) -> None:
    def chunks(hold: ai_tokens) -> Iterator[str]:
        yield from two_answers(model)(hold)

    def failing(_: ai_tokens) -> Iterator[str]:
        yield next(model.stream(PROMPT))
        raise ZeroDivisionError

    stream = stream_with_tokens(failing if way == "fail" else chunks, user, 1_500)
    next(stream)
    if way == "close":
        stream.close()
        stream.close()
    elif way == "fail":
        with pytest.raises(ZeroDivisionError):
            next(stream)
    elif way == "drop":
        del stream
    else:

        async def drop(streams: list[Any]) -> None:
            streams.clear()

        streams = [stream]
        del stream
        asyncio.run(drop(streams))
    gc.collect()
    wait_for(lambda: statuses(host) == ["settled"], "the hold to end")
    assert 0 < host.used(user) < 200
    assert host.value("SELECT count(*) FROM trueup.call_intent") == 0
    assert_true(host)


@pytest.mark.parametrize("reader", ["async", "sync"])
@pytest.mark.parametrize("way", ["aclose", "task ends", "task is cancelled", "drop"])
def test_an_async_stream_that_loses_its_reader_is_charged_for_its_part(
    way: str, reader: str, host: Host, user: int, model: MeteredModel
) -> None:
    async def view() -> None:
        if reader == "async":
            stream: Any = await astream_with_tokens(async_answers(model), user, 1_500)
        else:
            stream = stream_with_tokens(two_answers(model), user, 1_500)
        kept = [aiter(stream)]
        read = asyncio.Event()

        async def reads() -> str:
            await anext(kept[0])
            read.set()
            if way == "task is cancelled":
                await asyncio.Event().wait()
            return "the response ended"

        task = asyncio.create_task(reads())
        await read.wait()
        if way == "aclose":
            await stream.aclose() if reader == "async" else await asyncio.to_thread(stream.close)
        elif way == "task is cancelled":
            task.cancel()
        elif way == "drop":
            kept.clear()
            del stream
        await asyncio.wait([task])
        await asyncio.to_thread(wait_for, lambda: statuses(host) == ["settled"], "the hold to end")

    asyncio.run(view())
    assert 0 < host.used(user) < 200
    assert_true(host)


def test_a_denied_stream_raises_before_its_generator_runs(host: Host, model: MeteredModel) -> None:
    ran: list[int] = []

    def chunks(_: ai_tokens) -> Iterator[str]:
        ran.append(1)
        yield ""

    with pytest.raises(TokensDenied):
        stream_with_tokens(chunks, host.subscriber(10), 1_500)
    assert (ran, statuses(host)) == ([], [])


def test_a_source_of_chunks_that_cannot_be_read_releases_the_hold(host: Host, user: int) -> None:
    with pytest.raises(TypeError):
        stream_with_tokens(lambda _: None, user, 1_500)  # type: ignore[arg-type, return-value]

    async def view() -> None:
        await astream_with_tokens(lambda _: None, user, 1_500)  # type: ignore[arg-type, return-value]

    with pytest.raises(TypeError):
        asyncio.run(view())
    assert statuses(host) == ["released", "released"]


def test_a_model_call_without_a_hold_names_the_way_for_streaming_views(model: MeteredModel) -> None:
    with pytest.raises(NoHoldError, match="use stream_with_tokens"):
        model.complete(PROMPT)
