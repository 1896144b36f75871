"""The event loop that runs `async def` bodies: one for each worker process, on a thread of its own.

One loop for all bodies of a process, so that connections of asynchronous clients may be kept from task to task. On a
thread of its own, because a time limit's exception interrupts the thread that the task runs in, at any line: in the
middle of the loop's own code it would leave the loop broken. It also lets code that itself runs on a loop call a task.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from types import coroutine as generator_based
from typing import Any

from celery import Task
from celery._state import _task_stack

_body: ContextVar["_Body | None"] = ContextVar("trueup_async_body", default=None)

STOP_SECONDS = 5


class EventLoop:
    """An event loop on a thread of its own, started by the constructor."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_task_factory(_make_task)
        self._thread = threading.Thread(target=self._serve, name="trueup-event-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any], task: Task) -> Any:
        """Run a body to its end and return its result, or raise its error.

        The body sees the caller's context variables and `celery.current_task`. An exception that interrupts this
        thread meanwhile, such as a soft time limit, cancels the body. It is raised once the body has ended, unless the
        body catches `asyncio.CancelledError` and returns. Tasks that the body started and left are cancelled, as
        `asyncio.run` does.
        """
        body = _Body(task)
        ended, interrupt = None, None
        while True:
            try:
                if ended is None:
                    ended = asyncio.run_coroutine_threadsafe(body.run(coroutine), self._loop)
                result, error = ended.result()
                break
            except BaseException as raised:
                if ended is None:
                    coroutine.close()
                    raise
                interrupt = raised
                self._loop.call_soon_threadsafe(body.cancel)
        if isinstance(error, asyncio.CancelledError):
            # Celery handles an Exception; asyncio's CancelledError is none.
            raise interrupt or RuntimeError(f"The body of {task.name} was cancelled by its own code.") from error
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """Cancel what runs, end the thread and close the loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_SECONDS)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while True:
            try:
                self._loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt):
                # Raised in a task that the body started. The task has it as its error; asyncio raises it here too.
                continue
        self._loop.run_until_complete(self._end_all())
        self._loop.close()

    async def _end_all(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for one in rest:
            one.cancel()
        if rest:
            await asyncio.wait(rest)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class _Body:
    """One run of a body, and the asyncio tasks that it has started."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._request = task.request_stack.top
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
        """Run the body, then cancel the tasks that it has left. Returns its result and its error."""
        token = _body.set(self)
        first = asyncio.create_task(self._caught(coroutine))
        _body.reset(token)
        await asyncio.wait([first])
        while self._tasks:
            self.cancel()
            await asyncio.wait(tuple(self._tasks))
        if first.cancelled():  # before its first step
            return None, asyncio.CancelledError()
        return first.result()

    async def _caught(self, coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
        """Carry every error to the task's thread: SystemExit must end that thread's process, not this loop."""
        try:
            return await coroutine, None
        except BaseException as error:  # noqa: BLE001 - the task's thread raises it
            return None, error
        finally:
            coroutine.close()

    def cancel(self) -> None:
        for one in tuple(self._tasks):
            one.cancel()

    def make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, context: Context | None, options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(self._with_current_task(coroutine), loop=loop, context=context, **options)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A coroutine whose task is cancelled before its first step is never awaited, and Python would warn.
        task.add_done_callback(lambda _: coroutine.close())
        return task

    async def _with_current_task(self, coroutine: Any) -> Any:
        return await self._steps(coroutine)

    @generator_based
    def _steps(self, coroutine: Any) -> Generator[Any, Any, Any]:
        """Run each step of a coroutine as Celery's current task. Celery keeps that for each thread, not for a context.

        Several bodies may take turns on this thread, so it is set for one step only.
        """
        value: Any = None
        error: BaseException | None = None
        while True:
            with self._current():
                try:
                    awaited = coroutine.send(value) if error is None else coroutine.throw(error)
                except StopIteration as done:
                    return done.value
            value = error = None
            try:
                value = yield awaited
            except BaseException as raised:  # noqa: BLE001 - the coroutine gets it in its next step
                error = raised

    @contextmanager
    def _current(self) -> Iterator[None]:
        _task_stack.push(self._task)
        self._task.request_stack.push(self._request)
        try:
            yield
        finally:
            self._task.request_stack.pop()
            _task_stack.pop()


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Any, context: Context | None = None, **options: Any
) -> "asyncio.Task[Any]":
    body = _body.get() if context is None else context.get(_body)
    if body is None:
        return asyncio.Task(coroutine, loop=loop, context=context, **options)
    return body.make_task(loop, coroutine, context, options)


class _ProcessLoop:
    """This process's event loop. A forked child has none of its parent's threads, so it makes its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: EventLoop | None = None

    def get(self) -> EventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = EventLoop()
                atexit.register(self._loop.stop)
            return self._loop


_process_loop = _ProcessLoop()


def _forget_parents_loop() -> None:
    global _process_loop
    _process_loop = _ProcessLoop()


os.register_at_fork(after_in_child=_forget_parents_loop)


def run_async(coroutine: Coroutine[Any, Any, Any], task: Task) -> Any:
    """Run an `async def` body of `task` on this process's event loop, started on first use. See `EventLoop.run`."""
    if _body.get() is None:
        return _process_loop.get().run(coroutine, task)
    # Another body calls this one directly. The process's loop waits for the call, so it can't run it.
    loop = EventLoop()
    try:
        return loop.run(coroutine, task)
    finally:
        loop.stop()
