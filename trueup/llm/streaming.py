"""Streaming views: a hold that lives as long as a response's stream, and is charged for what was streamed.

A web framework runs a generator's steps in other threads and contexts than the view, and drops or closes the generator
when the client is gone. So the hold can't be a `with` block of the view, and a context variable that one step sets is
lost in the next. The iterators here bind the hold to each step, and end it once, whatever thread ends the stream.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

from trueup.billing.token_hold import ai_tokens
from trueup.database.threads import in_thread
from trueup.llm.metering import RunningHold, bound, finish

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


class TokenStream(Iterator[Chunk], Generic[Chunk]):
    """The chunks of a streaming response, with a hold. `close` ends both; dropping the object does too."""

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
            threading.Thread(target=self._close_dropped, name="trueup-stream").start()
        else:
            self._close_dropped()

    def _close_dropped(self) -> None:
        with _logged_errors(self._held):
            self.close()


class AsyncTokenStream(AsyncIterator[Chunk], Generic[Chunk]):
    """The chunks of an asynchronous streaming response, with a hold. `aclose` ends both; dropping the object does too.

    `close` is for frameworks that close a response from another thread than the event loop's.
    """

    def __init__(self, hold: ai_tokens, chunks: Callable[[ai_tokens], AsyncIterable[Chunk]]) -> None:
        self._is_closed = True
        self._held = _Held(hold)
        self._loop = asyncio.get_running_loop()
        with bound(self._held.running):
            self._chunks = aiter(chunks(hold))
        self._is_closed = False

    async def __anext__(self) -> Chunk:
        if self._is_closed:
            raise StopAsyncIteration
        self._loop = asyncio.get_running_loop()
        try:
            with bound(self._held.running):
                return await anext(self._chunks)
        except BaseException:  # the end of the chunks too, and the cancellation when the client is gone
            await self.aclose()
            raise

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
            # No generator can run on a loop that has ended. What it has charged is charged; release the rest.
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
