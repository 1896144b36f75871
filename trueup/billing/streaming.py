"""Streaming views: a hold that lives as long as a response's stream, and is charged for what was streamed.

A web framework runs a generator's steps in other threads and contexts than the view. When the client is gone, some
frameworks close the generator, others drop it. So the hold can't be a `with` block of the view, and a context variable
that one step sets is lost in the next. The iterators here bind the hold to each step, and end it once: when the
framework closes them, when the asyncio task that reads them ends, or at last when Python collects them.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, TypeVar

from trueup.billing.token_hold import ai_tokens
from trueup.database.threads import in_thread
from trueup.llm.awaitable import in_call_thread
from trueup.llm.running import RunningHold, bound, finish

logger = logging.getLogger(__name__)

Chunk = TypeVar("Chunk")


def stream_with_tokens(
    chunks: Callable[[ai_tokens], Iterable[Chunk]],
    user: Any,
    estimated_tokens: int,
    feature_name: str = "AI Feature",
    section: str = "other",
    key: str | None = None,
) -> "TokenStream[Chunk]":
    """Hold tokens now, and return what `chunks` yields. The hold ends with the stream, however that ends.

    `chunks`: a generator function. It receives the hold, to charge its own provider's usage; trueup's model client
    spends from the hold in each of its steps. The other arguments, and the errors, are those of `ai_tokens`: a view
    that is denied raises before its response has begun.
    """
    hold = ai_tokens(user, estimated_tokens, feature_name, section, key)
    hold.__enter__()
    try:
        return TokenStream(hold, chunks)
    except BaseException as error:
        hold.__exit__(type(error), error, error.__traceback__)
        raise


async def astream_with_tokens(
    chunks: Callable[[ai_tokens], AsyncIterable[Chunk]],
    user: Any,
    estimated_tokens: int,
    feature_name: str = "AI Feature",
    section: str = "other",
    key: str | None = None,
) -> "AsyncTokenStream[Chunk]":
    """Do as `stream_with_tokens` in an `async def` view. `chunks`: an asynchronous generator function."""
    hold = ai_tokens(user, estimated_tokens, feature_name, section, key)
    await hold.__aenter__()
    try:
        return AsyncTokenStream(hold, chunks)
    except BaseException as error:
        await hold.__aexit__(type(error), error, error.__traceback__)
        raise


class _Held:
    """A hold that a stream spends from, ended once."""

    def __init__(self, hold: ai_tokens) -> None:
        self.hold = hold
        self.running = RunningHold(hold.hold)

    def end(self) -> None:
        """Charge the streams of the model client that are open, and release the rest."""
        try:
            finish(self.running)
        finally:
            self.hold.__exit__(None, None, None)


class _Reader:
    """Ends a stream when the asyncio task that reads it has ended and left it open."""

    def __init__(self, end: Callable[[], object]) -> None:
        self._end = end
        self._task: asyncio.Task[Any] | None = None
        self.last: object = None  # the chunk that was read last

    def reads(self) -> None:
        """Note that the current task reads the next chunk."""
        task = asyncio.current_task()
        if task is not None and task is not self._task:
            self._task = task
            task.add_done_callback(self._has_ended)

    def _has_ended(self, task: "asyncio.Task[Any]") -> None:
        # `asyncio.wait_for` reads each chunk in a task of its own, whose result is the chunk. Another one follows.
        read_one = not task.cancelled() and task.exception() is None and task.result() is self.last
        if task is self._task and not read_one:
            self._end()


class TokenStream(Iterator[Chunk], Generic[Chunk]):
    """The chunks of a streaming response, with a hold. `close` ends both; dropping the object does too.

    An asynchronous framework may read it with `async for`. Each step then runs in a thread.
    """

    def __init__(self, hold: ai_tokens, chunks: Callable[[ai_tokens], Iterable[Chunk]]) -> None:
        self._is_closed = True  # until there is something to close
        self._lock = threading.RLock()
        self._held = _Held(hold)
        with bound(self._held.running):
            self._chunks = iter(chunks(hold))
        self._is_closed = False

    def __next__(self) -> Chunk:
        with self._lock:
            if self._is_closed:
                raise StopIteration
            try:
                with bound(self._held.running):
                    return next(self._chunks)
            except BaseException:  # the end of the chunks too
                self.close()
                raise

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return _InThreads(self)

    def close(self) -> None:
        """End the generator, charge what was streamed, and release the rest. A second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            try:
                with bound(self._held.running):
                    getattr(self._chunks, "close", lambda: None)()
            finally:
                self._held.end()

    def __del__(self) -> None:
        if self._is_closed:
            return
        if _runs_event_loop():
            # The database must not block the loop that happens to drop the stream.
            threading.Thread(target=self.close_dropped, name="trueup-stream").start()
        else:
            self.close_dropped()

    def close_dropped(self) -> None:
        """Do as `close` for a stream that has no reader any more: log an error instead of raising it."""
        with _logged_errors(self._held):
            self.close()


class _InThreads(AsyncIterator[Chunk], Generic[Chunk]):
    """Reads a `TokenStream` for `async for`."""

    def __init__(self, stream: TokenStream[Chunk]) -> None:
        self._stream = stream
        self._reader = _Reader(lambda: in_call_thread(stream.close_dropped))

    async def __anext__(self) -> Chunk:
        self._reader.reads()
        step = asyncio.wrap_future(in_call_thread(lambda: list(islice(self._stream, 1))))
        try:
            chunks = await step
        except asyncio.CancelledError:
            in_call_thread(self._stream.close_dropped)
            raise
        if not chunks:
            raise StopAsyncIteration
        self._reader.last = chunks[0]
        return chunks[0]


class AsyncTokenStream(AsyncIterator[Chunk], Generic[Chunk]):
    """The chunks of an asynchronous streaming response, with a hold. `aclose` ends both; dropping the object does too.

    `close` is for frameworks that close a response from another thread than the event loop's.
    """

    def __init__(self, hold: ai_tokens, chunks: Callable[[ai_tokens], AsyncIterable[Chunk]]) -> None:
        self._is_closed = True
        self._held = _Held(hold)
        self._reader = _Reader(_closes(weakref.ref(self)))  # a cycle would delay `__del__`
        self._loop = asyncio.get_running_loop()
        with bound(self._held.running):
            self._chunks = aiter(chunks(hold))
        self._is_closed = False

    async def __anext__(self) -> Chunk:
        if self._is_closed:
            raise StopAsyncIteration
        self._loop = asyncio.get_running_loop()
        self._reader.reads()
        try:
            with bound(self._held.running):
                chunk = await anext(self._chunks)
        except BaseException:  # the end of the chunks too, and the cancellation when the client is gone
            await self.aclose()
            raise
        self._reader.last = chunk
        return chunk

    async def aclose(self) -> None:
        """End the generator, charge what was streamed, and release the rest. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            with bound(self._held.running):
                aclose: Callable[[], Coroutine[Any, Any, None]] | None = getattr(self._chunks, "aclose", None)
                if aclose is not None:
                    await aclose()
        finally:
            await in_thread(self._held.end)

    def close(self) -> None:
        """Do as `aclose`, from any thread."""
        if self._is_closed:
            return
        if not self._loop.is_running():
            # No generator can run on a loop that has ended. Its usage was charged as it came; release the rest.
            self._is_closed = True
            self._held.end()
        elif _runs_event_loop():
            _in_background(self._loop, self._close_dropped)
        else:
            asyncio.run_coroutine_threadsafe(self.aclose(), self._loop).result()

    def __del__(self) -> None:
        if self._is_closed:
            return
        if self._loop.is_running():
            _in_background(self._loop, self._close_dropped)
        else:
            with _logged_errors(self._held):
                self.close()

    async def _close_dropped(self) -> None:
        with _logged_errors(self._held):
            await self.aclose()


def _closes(stream: "weakref.ref[AsyncTokenStream[Any]]") -> Callable[[], None]:
    """Return a function that closes the stream if it is still there."""

    def close() -> None:
        found = stream()
        if found is not None:
            found.close()

    return close


class _logged_errors(suppress):  # noqa: N801 - used as a function
    """Log an error that has no caller to reach: the stream was dropped, and its end failed."""

    def __init__(self, held: _Held) -> None:
        super().__init__(Exception)
        self._task_id = held.running.hold.task_id

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        if error is not None:
            logger.error("stream not ended cleanly task=%s error=%s", self._task_id, error, exc_info=error)
        return super().__exit__(kind, error, traceback)


# asyncio keeps weak references only, and a task that is collected does not run.
_background: set["asyncio.Task[None]"] = set()


def _in_background(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    def start() -> None:
        task = loop.create_task(work())
        _background.add(task)
        task.add_done_callback(_background.discard)

    loop.call_soon_threadsafe(start)


def _runs_event_loop() -> bool:
    """Return whether this thread runs an event loop, so that it must not wait."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
