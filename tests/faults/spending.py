"""The worker's side of a round: the task that spends, and shorter waits. Loaded with `-I tests.faults.spending`.

This module does not change what a task may spend or how that is recorded. It shortens waits, so that a round takes
seconds, and adds the calling process to each request to the provider and to Instagram.
"""

import asyncio
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from itertools import islice
from typing import Any

import httpx
import httpx2
import openai
import psycopg
import sqlalchemy.dialects.postgresql.psycopg  # noqa: F401
from kombu import Connection

import trueup.settings.settings
import trueup.tasks.requeue
from tests.faults.kinds import CHUNKS_READ, HOLD_TTL_SECONDS, LEASE_MARGIN_SECONDS, VISIBILITY_SECONDS
from tests.faults.loopback import LANE_HEADER, PID_HEADER, RUN_HEADER
from tests.faults.planned import COMPLETE, SPEND_TASKS, STREAM_CLOSED, STREAM_LEFT
from tests.faults.prompts import prompt_of
from trueup.accounts.user_ids import UserId
from trueup.llm.awaitable import AsyncCompletionStream
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Completion, CompletionStream, Message
from trueup.llm.running import running_hold
from trueup.llm.tokens import offline_counter
from trueup.settings.settings import get_settings
from trueup.tasks import metered_task
from trueup.worker.celery import app

# The tokens of a call besides its words: the rest of the prompt, and a short answer.
ROOM_TOKENS = 40

# The number of the running body in this process, and of the thread that makes its call.
_runs = itertools.count(1)
_run: ContextVar[int] = ContextVar("_run", default=0)
_lane: ContextVar[int] = ContextVar("_lane", default=0)


@contextmanager
def _body() -> Iterator[None]:
    """Give the calls of the block the number of one run of a body."""
    token = _run.set(next(_runs))
    try:
        yield
    finally:
        _run.reset(token)


def _result(label: str, answers: list[Completion | None], extensions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a task's result: its request, the answers that it got, the tokens spent, how the hold was extended."""
    received = [answer for answer in answers if answer is not None]
    return {
        "request": label,
        "answers": [answer.model_name for answer in received],
        "spent": sum(answer.total_tokens for answer in received),
        "extensions": extensions,
    }


def _estimate(arguments: Any) -> int:
    tokens: int = arguments["tokens"]
    return tokens


# No parameter has a default: the fingerprint of a request is then that of the arguments that the harness sends.
_OPTIONS: dict[str, Any] = {
    "feature_name": "Faults",
    "section": "chat",
    "estimated_tokens": _estimate,
    "default_retry_delay": 0.3,
}


@metered_task(name=SPEND_TASKS["plain"], **_OPTIONS)
def spend(
    model: MeteredModel,
    user_id: UserId,
    label: str,
    tokens: int,
    ways: list[str],
    words: int,
    seconds: float,
    cap: int | None,
    extends: bool,
    works: float,
) -> dict[str, Any]:
    """Make a call in each of the ways, with a pause after it, and work for `works` seconds after the first.

    `extends`: extend the hold before a call that it does not cover. When that is denied, end with the calls so far.
    """
    answers, extensions = list[Completion | None](), list[dict[str, Any]]()
    with _body():
        for call, way in enumerate(ways, 1):
            if extends and model.tokens_left < words + ROOM_TOKENS:
                extensions.append(_extend(model, words + ROOM_TOKENS))
                if not extensions[-1]["granted"]:
                    break
            answers.append(_buy(model, _messages(label, call, user_id, words), way, cap))
            time.sleep(seconds + (works if call == 1 else 0))
    return _result(label, answers, extensions)


@metered_task(name=SPEND_TASKS["threads"], **_OPTIONS)
def spend_in_threads(
    model: MeteredModel,
    user_id: UserId,
    label: str,
    tokens: int,
    ways: list[str],
    words: int,
    seconds: float,
    cap: int | None,
    extends: bool,
    works: float,
) -> dict[str, Any]:
    """Do as `spend`, with all calls at once, each in a thread of its own."""

    def buy(call: int, way: str) -> Completion | None:
        _lane.set(call)
        answer = _buy(model, _messages(label, call, user_id, words), way, cap)
        time.sleep(seconds)
        return answer

    with _body(), ThreadPoolExecutor(len(ways)) as pool:
        buying = [pool.submit(copy_context().run, buy, call, way) for call, way in enumerate(ways, 1)]
    return _result(label, [future.result() for future in buying], [])


@metered_task(name=SPEND_TASKS["async"], **_OPTIONS)
async def spend_async(
    model: MeteredModel,
    user_id: UserId,
    label: str,
    tokens: int,
    ways: list[str],
    words: int,
    seconds: float,
    cap: int | None,
    extends: bool,
    works: float,
) -> dict[str, Any]:
    """Do as `spend`, by the awaitable methods of the model client."""
    answers, extensions = list[Completion | None](), list[dict[str, Any]]()
    with _body():
        for call, way in enumerate(ways, 1):
            if extends and model.tokens_left < words + ROOM_TOKENS:
                before = model.tokens_left
                granted = await model.aextend(words + ROOM_TOKENS)
                extensions.append(_extension(model, words + ROOM_TOKENS, before, granted))
                if not granted:
                    break
            answers.append(await _abuy(model, _messages(label, call, user_id, words), way, cap))
            await asyncio.sleep(seconds + (works if call == 1 else 0))
    return _result(label, answers, extensions)


def _messages(label: str, call: int, user_id: UserId, words: int) -> list[Message]:
    return [Message(role="user", content=prompt_of(label, call, user_id, words))]


async def _abuy(model: MeteredModel, messages: list[Message], way: str, cap: int | None) -> Completion | None:
    if way == COMPLETE:
        return await model.acomplete(messages, max_completion_tokens=cap)
    stream = model.astream(messages, max_completion_tokens=cap)
    chunks = None if way not in (STREAM_CLOSED, STREAM_LEFT) else CHUNKS_READ
    if way == STREAM_LEFT:  # for the base task to end
        await _aread(stream, chunks)
        return None
    async with stream:
        await _aread(stream, chunks)
    return await stream.acompletion()


async def _aread(stream: AsyncCompletionStream, chunks: int | None) -> None:
    read = 0
    while chunks is None or read < chunks:
        if await anext(stream, None) is None:
            break
        read += 1


def _extend(model: MeteredModel, tokens: int) -> dict[str, Any]:
    before = model.tokens_left
    return _extension(model, tokens, before, model.extend(tokens))


def _extension(model: MeteredModel, tokens: int, before: int, granted: bool) -> dict[str, Any]:
    hold = running_hold()
    return {
        "asked": tokens,
        "granted": granted,
        "added": model.tokens_left - before,
        "attempt": hold.attempt if hold else 0,
    }


def _buy(model: MeteredModel, messages: list[Message], way: str, cap: int | None) -> Completion | None:
    if way == COMPLETE:
        return model.complete(messages, max_completion_tokens=cap)
    stream = model.stream(messages, max_completion_tokens=cap)
    if way == STREAM_LEFT:  # the base task ends it
        _read(stream, CHUNKS_READ)
        return None
    with stream:
        _read(stream, CHUNKS_READ if way == STREAM_CLOSED else None)
    return stream.completion()


def _read(stream: CompletionStream, chunks: int | None) -> None:
    for _ in islice(stream, chunks):
        pass


def _shorten_waits() -> None:
    trueup.tasks.requeue.PROVIDER_RETRY_BASE_SECONDS = 0.2  # type: ignore[assignment]
    # A hold's lease is then 2.5 s: shorter than the longest stop of a process, longer than any call except a long
    # stream.
    trueup.settings.settings.LEASE_MARGIN_SECONDS = LEASE_MARGIN_SECONDS  # type: ignore[assignment]
    # Past its validators, which allow no hold as short as this.
    object.__setattr__(get_settings(), "hold_ttl_seconds", HOLD_TTL_SECONDS)
    options: dict[str, Any] = app.conf.broker_transport_options
    options.update(
        visibility_timeout=VISIBILITY_SECONDS,
        unacked_restore_interval=1,
        # A worker killed in the middle of its sweep prevents all others from sweeping for this long.
        unacked_mutex_expire=2,
    )


def _reconnect_soon() -> None:
    """Shorten the waits between a worker's attempts to reach Redis, which are 2, 4 and 6 s."""
    names = inspect.getfullargspec(Connection._ensure_connection).args[1:]
    defaults = dict(zip(names, Connection._ensure_connection.__defaults__, strict=True))
    defaults |= {"interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.5}
    Connection._ensure_connection.__defaults__ = tuple(defaults.values())


def _warm_up() -> None:
    """Load before the fork what each pool process would load with its first task, which takes seconds of a round."""
    offline_counter().count("warm")
    with openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1/v1") as client:
        _ = client.chat.completions.with_raw_response
    assert psycopg.pq.__impl__


def _sign_requests() -> None:
    for client in (httpx.Client, httpx2.Client):
        client.send = _signed(client.send)  # type: ignore[assignment,method-assign]


def _signed(send: Callable[..., Any]) -> Callable[..., Any]:
    def signed(client: Any, request: Any, **options: Any) -> Any:
        request.headers[PID_HEADER] = str(os.getpid())
        request.headers[RUN_HEADER] = str(_run.get())
        request.headers[LANE_HEADER] = str(_lane.get())
        return send(client, request, **options)

    return signed


_warm_up()
_shorten_waits()
_reconnect_soon()
_sign_requests()
