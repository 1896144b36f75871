"""Work that waits for the database, done in a thread so that an event loop need not wait with it."""

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def in_thread(work: Callable[[], Result], *, undo: Callable[[], object] | None = None) -> Result:
    """Run the work in a thread and return its result.

    Work that has been asked for is done, also when the caller is cancelled meanwhile: a hold is to be closed then all
    the more. `undo` is run after work whose result nobody waited for; an error of such work is logged.
    """
    loop = asyncio.get_running_loop()
    working = loop.run_in_executor(None, contextvars.copy_context().run, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        working.add_done_callback(lambda done: _end_unwanted(loop, done, undo))
        raise


def _end_unwanted(
    loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Result]", undo: Callable[[], object] | None
) -> None:
    error = done.exception()
    if error is not None:
        logger.error("what a cancelled caller had asked for failed: %s", error, exc_info=error)
    elif undo is not None:
        loop.run_in_executor(None, undo)
