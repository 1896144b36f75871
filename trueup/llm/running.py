"""The hold that the running task, request or stream spends from.

The metered base task sets it in a context variable while its body runs. Code that calls a task's body in any other way
finds no hold and can't spend.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

from trueup.database.retry import PASSING
from trueup.database.threads import in_thread
from trueup.errors import NoHoldError
from trueup.gate.holds import Hold
from trueup.llm.awaitable import InFlight
from trueup.settings.settings import get_settings

_running: ContextVar["RunningHold | None"] = ContextVar("trueup_running_hold", default=None)


class OpenStream(Protocol):
    """A stream that is being paid for. `close` charges the received part; a second call does nothing."""

    def close(self) -> None: ...


class RunningHold:
    """The hold of the running task and its remaining tokens. Each attempt of a task has its own.

    The body may call the model from several threads, if each of them runs in a copy of the body's context.
    `tokens_left` is what the database answered last. Another thread's call may have changed it since, so it only
    proposes a bound, and the database decides.
    """

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.tokens_left = hold.tokens_left
        self.in_flight = InFlight()
        self.is_lost = False  # set by a late charge, which means that this attempt no longer has the hold
        self._lock = threading.Lock()
        self._streams: set[OpenStream] = set()  # open streams; each must be charged before the body ends
        self._calls = 0  # calls in progress, from the intent to the charge
        self._call_ended = threading.Condition(self._lock)
        self._is_over = False

    def add_stream(self, stream: OpenStream) -> None:
        """Have the stream charged when the body ends; at once if it has ended."""
        with self._lock:
            is_over = self._is_over
            if not is_over:
                self._streams.add(stream)
        if is_over:
            stream.close()

    def remove_stream(self, stream: OpenStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Have the hold's end wait for this block. Raises `NoHoldError` once the body has ended."""
        with self._lock:
            self.refuse_if_over()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._call_ended.notify_all()

    def wait_for_calls(self) -> None:
        """Return once no call is in progress, or after the time of a lease: no call takes longer."""
        with self._lock:
            self._call_ended.wait_for(lambda: not self._calls, get_settings().lease_seconds)

    @property
    def is_over(self) -> bool:
        """True once the body has ended: no call may begin any more."""
        return self._is_over

    def refuse_if_over(self) -> None:
        """Raise `NoHoldError` once the body has ended: a thread that it left behind must not spend any more."""
        if self._is_over:
            raise NoHoldError(
                f"A thread called a model after the body of task {self.hold.task_id} had ended, so no tokens are held "
                "for the call. Nothing was spent. Wait for the body's threads before it returns."
            )

    def end(self) -> tuple[OpenStream, ...]:
        """Admit no further calls. Returns the streams that are open."""
        with self._lock:
            self._is_over = True
            return tuple(self._streams)


def running_now() -> RunningHold | None:
    """Return what this context spends from; None outside of a metered task, block or stream."""
    return _running.get()


def running_hold() -> Hold | None:
    """Return the hold of the metered task that runs in this context; None outside of one."""
    running = _running.get()
    return running.hold if running else None


class spending_from:  # noqa: N801 - used as a function: `with spending_from(hold)`
    """Lets model calls in this context spend from `hold` until the block ends. It then charges open streams.

    `async with` does the same without blocking the event loop. For a generator that a web framework resumes use
    `stream_with_tokens`: each of its steps may run in another context.
    """

    def __init__(self, hold: Hold) -> None:
        self._running = RunningHold(hold)
        self._bound = bound(self._running)

    def __enter__(self) -> RunningHold:
        self._bound.__enter__()
        return self._running

    def __exit__(self, *error: Any) -> None:
        try:
            finish(self._running)
        finally:
            self._bound.__exit__(None, None, None)

    async def __aenter__(self) -> RunningHold:
        return self.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        self._bound.__exit__(None, None, None)
        await in_thread(lambda: finish(self._running))


@contextmanager
def bound(running: RunningHold) -> Iterator[None]:
    """Let model calls in this context spend from a hold until the block ends."""
    previous = _running.get()
    _running.set(running)
    try:
        yield
    finally:
        # A generator may be closed in another context than it began in. That context has another value, or none.
        if _running.get() is running:
            _running.set(previous)


def finish(running: RunningHold) -> None:
    """Wait for the calls that cancelled callers and the body's threads have left running; charge the open streams."""
    try:
        running.in_flight.wait()
    finally:  # a time limit's exception may end the wait
        _close_streams(running)
    running.wait_for_calls()


def _close_streams(running: RunningHold) -> None:
    """Charge the streams that the body left open. A stream that can't be charged now must not stop the others."""
    for stream in running.end():
        with suppress(*PASSING):  # already logged; the call intent stays recorded
            stream.close()


def running_or_refuse() -> RunningHold:
    """Return what this context spends from. Raises `NoHoldError` if there is nothing, or the body has ended."""
    running = _running.get()
    if running is None:
        raise NoHoldError(
            "A model was called outside a metered task, so no tokens are held for the call. Nothing was spent. "
            "Call the task itself (delay, apply_async, or directly), not its run method. In the generator of a "
            "streaming view, use stream_with_tokens."
        )
    running.refuse_if_over()
    return running
