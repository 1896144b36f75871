"""One snapshot for all open pages of a process, read while someone looks, and sent as server-sent events.

The database is read at most every `INTERVAL_SECONDS`, and rests `RESTS` times as long as it worked. A page asks nothing
itself: it waits for a change, and gets only the parts that changed since it last did.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass

from anyio import CapacityLimiter, to_thread
from jinja2 import Environment

from trueup.api.page.parts import attention, parts_of, problem_part
from trueup.api.page.snapshot import read_snapshot
from trueup.errors import ServiceUnavailableError, TrueupError
from trueup.host.mapping import UserIdType
from trueup.monitoring.broker import BrokerState

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
RESTS = 9
BROKER_SECONDS = 10.0
HEARTBEAT_SECONDS = 15.0
# Then the browser connects again, and its login is checked again.
STREAM_SECONDS = 300.0
MAX_PAGES = 500

ReadBroker = Callable[[], BrokerState]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the page, and the version in which it last changed."""

    html: str
    version: int


@dataclass(frozen=True, kw_only=True)
class View:
    """The newest state of all parts. `say`: what a screen reader is told. `is_stale`: the figures could not be read."""

    version: int
    parts: dict[str, Part]
    say: str
    is_stale: bool


class Live:
    """The open pages of one process. Its methods belong to the event loop; reading runs in threads of its own.

    `open_pages`: streams that are open now. `pause_seconds`: the least time between two readings.
    """

    def __init__(self, pages: Environment, user_id_type: UserIdType, read_broker: ReadBroker | None) -> None:
        self._pages = pages
        self._user_id_type = user_id_type
        self._read_broker = read_broker
        self._broker: BrokerState | None = None
        self._broker_problem = None if read_broker else "This process does not know the broker."
        self._boot = secrets.token_hex(4)
        self._view = View(version=0, parts={}, say="", is_stale=True)
        self._read_at = float("-inf")
        self._broker_at = float("-inf")
        self.pause_seconds = INTERVAL_SECONDS
        self._changed = asyncio.Event()
        self._reading = asyncio.Lock()
        self._threads = CapacityLimiter(2)
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: dict[int, bytes] = {}
        self._is_closed = False
        self.open_pages = 0

    async def view(self) -> View:
        """Return the state of the page, not older than the pause between two readings."""
        if time.monotonic() - self._read_at >= self.pause_seconds:
            await self._refresh()
        return self._view

    def outdate(self) -> None:
        """Let the next page read a new snapshot: a decision was made. Any thread may call it."""
        self._read_at = float("-inf")

    def identify(self, view: View) -> str:
        """Return the id of a state. After a restart of the process, ids of earlier ones mean nothing."""
        return f"{self._boot}-{view.version}"

    async def events(self, seen: str, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """Yield the changes after the state `seen` as server-sent events, and comments while there are none.

        It ends when the browser has gone, when the process stops, or after `STREAM_SECONDS`.
        """
        boot, _, number = seen.partition("-")
        version = int(number) if boot == self._boot and number.isdecimal() and len(number) < 18 else 0
        ends_at = time.monotonic() + STREAM_SECONDS
        self.open_pages += 1
        self._keep_reading()
        try:
            yield b"retry: 3000\n\n"
            while not self._is_closed and time.monotonic() < ends_at and not await is_gone():
                changed = self._changed
                if self._view.version > version:
                    yield self._event(version)
                    version = self._view.version
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self.open_pages -= 1

    def close(self) -> None:
        """End all streams, so that the server can stop."""
        self._is_closed = True
        self._wake()
        for task in self._tasks:
            task.cancel()

    def _event(self, version: int) -> bytes:
        """Return the event with all parts that changed after `version`. Pages at the same version share it."""
        if version not in self._events:
            view = self._view
            parts = {name: part.html for name, part in view.parts.items() if part.version > version}
            data = json.dumps({"parts": parts, "say": view.say}, ensure_ascii=False)
            self._events[version] = f"id: {self.identify(view)}\nevent: parts\ndata: {data}\n\n".encode()
        return self._events[version]

    def _wake(self) -> None:
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()

    def _keep_reading(self) -> None:
        """Start the loop that reads while pages are open, unless it runs."""
        if not any(task.get_name() == "reading" for task in self._tasks):
            self._start(self._read_while_open(), "reading")

    def _start(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read_while_open(self) -> None:
        while self.open_pages and not self._is_closed:
            await self.view()
            await asyncio.sleep(max(0.05, self._read_at + self.pause_seconds - time.monotonic()))

    async def _refresh(self) -> None:
        """Read a snapshot, unless another request has just read one."""
        async with self._reading:
            if time.monotonic() - self._read_at < self.pause_seconds:
                return
            self._ask_broker()
            began = time.monotonic()
            try:
                parts, say = await to_thread.run_sync(self._read, limiter=self._threads)
                stale = False
            except TrueupError as error:
                logger.warning("page not refreshed error=%s", error)
                parts, say, stale = problem_part(self._pages, _told(error)), "The figures can't be read now.", True
            except Exception:
                logger.exception("page not refreshed")
                problem = "Reading failed on the server. Its log names the cause."
                parts, say, stale = problem_part(self._pages, problem), "The figures can't be read now.", True
            self._read_at = time.monotonic()
            self.pause_seconds = max(INTERVAL_SECONDS, RESTS * (self._read_at - began))
            self._publish(parts, say, stale)

    def _read(self) -> tuple[dict[str, str], str]:
        snapshot = read_snapshot(self._user_id_type)
        parts = parts_of(self._pages, snapshot, self._broker, self._broker_problem)
        return parts, attention(snapshot)

    def _publish(self, parts: dict[str, str], say: str, stale: bool) -> None:
        before, version = self._view, self._view.version + 1
        new = {
            name: Part(html=html, version=version)
            for name, html in parts.items()
            if name not in before.parts or before.parts[name].html != html
        }
        if not new and say == before.say and stale == before.is_stale:
            return
        self._view = View(version=version, parts={**before.parts, **new}, say=say, is_stale=stale)
        self._events.clear()
        self._wake()

    def _ask_broker(self) -> None:
        """Ask the queues and workers in the background: their answers take a second, for which no page waits."""
        now = time.monotonic()
        if self._read_broker is not None and now - self._broker_at >= BROKER_SECONDS:
            self._broker_at = now
            self._start(self._take_broker(self._read_broker), "broker")

    async def _take_broker(self, read: ReadBroker) -> None:
        try:
            self._broker = await to_thread.run_sync(read, limiter=self._threads)
            self._broker_problem = None
        except ServiceUnavailableError as error:
            self._broker, self._broker_problem = None, _told(error)
        except Exception:
            logger.exception("queues not read")
            self._broker, self._broker_problem = None, "The queues can't be read. The server's log names the cause."


def _told(error: TrueupError) -> str:
    """Return an error for a page. Only the log names the servers' addresses."""
    if isinstance(error, ServiceUnavailableError):
        return f"{error.service} does not answer. The page tries again by itself."
    return "The database is not ready for trueup. `trueup doctor` says why."
