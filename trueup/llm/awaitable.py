"""The awaitable face of a model client, for `async def` code: each method does its work in a thread.

A caller that is cancelled does not wait for its call any more. The call itself continues: it was bought, so it is
charged. `InFlight` lets the hold's end wait for such calls.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from types import TracebackType
from typing import Any, Protocol, TypeVar

from trueup.llm.model import Completion, CompletionStream, Message, Model

# Calls of one process at once; more wait for a free thread. Most of a call's time is the provider's.
MAX_CALL_THREADS = 64

Result = TypeVar("Result")


class InFlight:
    """The calls of one hold that run in threads."""

    def __init__(self) -> None:
        self._calls: set[Future[Any]] = set()

    def start(self, work: Callable[[], Result]) -> "Future[Result]":
        """Run the work in a thread. It is waited for before the hold ends."""
        future = in_call_thread(work)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def wait(self) -> None:
        """Return once no call runs in a thread."""
        wait(tuple(self._calls))


class AsyncCompletionStream(AsyncIterator[str]):
    """A `CompletionStream` for `async for` and `async with`. It is opened when first used.

    A stream costs tokens from the moment it is opened, so the code that opens one must end it, best with `async with`.
    """

    def __init__(self, open_stream: Callable[[], CompletionStream], in_flight: InFlight) -> None:
        self._open_stream = open_stream
        self._in_flight = in_flight
        self._stream: CompletionStream | None = None
        self._last: Future[Any] | None = None  # what was done with the stream last; it may still run
        self._is_closed = False

    async def __anext__(self) -> str:
        if self._is_closed:
            raise StopAsyncIteration
        chunk = await self._do(lambda: next(self._opened(), None))
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """End the stream and close its connection. A second call does nothing."""
        self._is_closed = True
        if self._last is not None:
            await self._do(self._close)

    async def acompletion(self) -> Completion:
        """Return the received part and its usage. A running stream is closed first."""
        return await self._do(lambda: self._opened().completion())

    async def __aenter__(self) -> "AsyncCompletionStream":
        await self._do(self._opened)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _opened(self) -> CompletionStream:
        if self._stream is None:
            self._stream = self._open_stream()
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    async def _do(self, work: Callable[[], Result]) -> Result:
        """Do work on the stream in a thread, after what a cancelled caller has left running."""
        before = self._last

        def after_the_last() -> Result:
            if before is not None:
                wait([before])
            return work()

        self._last = self._in_flight.start(after_the_last)
        return await asyncio.wrap_future(self._last)


class AwaitableModel:
    """Adds the awaitable methods to a model client. They do as the methods without the leading `a`."""

    def in_flight(self) -> InFlight:
        """Return the calls in threads of the running hold. Raises `NoHoldError` outside a metered task."""
        raise NotImplementedError

    async def acomplete(
        self: "SyncModel", messages: Sequence[Message], *, max_completion_tokens: int | None = None
    ) -> Completion:
        """Do as `complete`, without blocking the event loop."""
        work = self.in_flight().start(lambda: self.complete(messages, max_completion_tokens=max_completion_tokens))
        return await asyncio.wrap_future(work)

    def astream(
        self: "SyncModel", messages: Sequence[Message], *, max_completion_tokens: int | None = None
    ) -> AsyncCompletionStream:
        """Do as `stream`, for `async for`. The stream is opened, and may raise, when it is first used."""
        return AsyncCompletionStream(
            lambda: self.stream(messages, max_completion_tokens=max_completion_tokens), self.in_flight()
        )

    async def aextend(self: "SyncModel", tokens: int) -> bool:
        """Do as `extend`, without blocking the event loop."""
        return await asyncio.wrap_future(self.in_flight().start(lambda: self.extend(tokens)))


class SyncModel(Model, Protocol):
    """What `AwaitableModel` needs of the class that it is mixed into."""

    def in_flight(self) -> InFlight: ...


_threads: ThreadPoolExecutor | None = None
_threads_lock = threading.Lock()


def in_call_thread(work: Callable[[], Result]) -> "Future[Result]":
    """Run the work in one of this process's threads for calls. It sees the caller's context variables."""
    global _threads
    with _threads_lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(MAX_CALL_THREADS, thread_name_prefix="trueup-model")
        return _threads.submit(copy_context().run, work)


def _forget_parents_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _threads, _threads_lock
    _threads, _threads_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_parents_threads)
