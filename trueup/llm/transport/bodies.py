"""The body of a streamed answer, as the HTTP library reads it: synchronous or asynchronous."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from trueup.errors import TrueupError
from trueup.llm.running import RunningHold
from trueup.llm.transport.refusals import passing_through_sdks
from trueup.llm.transport.taps import LongAnswer, Tap

Result = TypeVar("Result")


class TappedBody:
    """Passes a body on through a tap. The classes of each HTTP library's byte streams inherit from it."""

    def __init__(self, source: Any, tap: Tap | LongAnswer) -> None:
        self._source = source
        self._tap = tap

    def __iter__(self) -> Iterator[bytes]:
        tap = self._tap
        with passing_through_sdks():
            try:
                for part in self._source:
                    passed = tap.feed(part)
                    if tap.is_due:
                        tap.settle()
                    if passed:
                        yield passed
                rest = tap.end()
            except TrueupError:
                raise
            except Exception as error:
                tap.settle(error)
                raise
            tap.settle()
            if rest:
                yield rest

    def close(self) -> None:
        try:
            self._source.close()
        finally:
            with passing_through_sdks():
                self._tap.settle()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        tap = self._tap
        with passing_through_sdks():
            try:
                async for part in self._source:
                    passed = tap.feed(part)
                    if tap.is_due:
                        await recorded(tap.purchase.call.running, tap.settle)
                    if passed:
                        yield passed
                rest = tap.end()
            except TrueupError:
                raise
            except Exception as error:
                broken = error  # the name ends with the block
                await recorded(tap.purchase.call.running, lambda: tap.settle(broken))
                raise
            if not tap.purchase.is_settled:
                await recorded(tap.purchase.call.running, tap.settle)
            if rest:
                yield rest

    async def aclose(self) -> None:
        try:
            await self._source.aclose()
        finally:
            with passing_through_sdks():
                await recorded(self._tap.purchase.call.running, self._tap.settle)


def closer_of(source: Any) -> Callable[[], object]:
    """Return a function that closes an asynchronous source from any thread. It does not wait."""
    loop = asyncio.get_running_loop()

    async def close() -> None:
        with suppress(Exception):  # the loop's own task may be reading it
            await source.aclose()

    def start() -> None:
        if not loop.is_closed() and loop.is_running():
            asyncio.run_coroutine_threadsafe(close(), loop)

    return start


async def recorded(running: RunningHold, work: Callable[[], Result]) -> Result:
    """Do work that must be completed in a thread, even if the caller is cancelled. The hold's end waits for it."""
    return await asyncio.shield(asyncio.wrap_future(running.in_flight.start(work)))


async def undone_if_cancelled(
    running: RunningHold, work: Callable[[], Result], undo: Callable[[Result], object]
) -> Result:
    """Do work in a thread. If the caller is cancelled meanwhile, the work is undone when it has succeeded."""
    future = running.in_flight.start(work)
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except asyncio.CancelledError:

        def undo_success() -> None:
            with suppress(TrueupError):
                undo(future.result())

        running.in_flight.start(undo_success)
        raise
