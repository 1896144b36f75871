"""Blocking work in a thread, so that it does not block the event loop."""

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def in_thread(work: Callable[[], Result], *, undo: Callable[[], object] | None = None) -> Result:
    """Run the work in a thread and return its result.

    The work is completed even if the caller is cancelled: a hold must be closed then too. If the caller was cancelled,
    `undo` runs after successful work, and an error of the work is logged.
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
        logger.error("work of a cancelled caller failed error=%r", str(error), exc_info=error)
    elif undo is not None:
        loop.run_in_executor(None, undo)
