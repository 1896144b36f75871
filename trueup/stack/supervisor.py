"""The supervisor of `trueup up`: it starts, watches and stops servers, workers, beat and API, with one log."""

import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from trueup.extras import missing_modules
from trueup.settings.settings import Settings
from trueup.stack.children import Child, ChildRecords, reap_leftovers, start_child
from trueup.stack.commands import API, Command, embedded_settings, page_settings, stack_commands
from trueup.stack.errors import ChildFailedError, StackAlreadyRunningError, explained
from trueup.stack.layout import Layout, prepare_layout
from trueup.stack.leases import Lease
from trueup.stack.locks import FileLock
from trueup.stack.running import StackUrls, leased_stack

_TICK_SECONDS = 0.1
_TEND_SECONDS = 2.0
_TRY_SECONDS = 1.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COLOURS = ("36", "33", "35", "32", "34", "31")  # ANSI foreground colours
_OWN_NAME = "trueup"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """When the supervisor restarts and kills. Times are seconds."""

    grace_seconds: float = 45.0  # for a worker to finish its tasks after SIGTERM
    fast_seconds: float = 5.0  # between the second request and SIGKILL
    failures_allowed: int = 5  # so many deaths within the window end the whole stack
    failure_window_seconds: float = 60.0
    first_pause_seconds: float = 1.0  # before a restart; doubles with each failure in the window
    longest_pause_seconds: float = 15.0


def run_stack(
    settings: Settings,
    *,
    commands: Sequence[Command] | None = None,
    before_servers: Callable[[], None] | None = None,
    before_commands: Callable[[StackUrls], None] | None = None,
    policy: Policy | None = None,
    output: TextIO | None = None,
) -> None:
    """Run the stack until Ctrl-C, SIGTERM or SIGHUP. A second request stops it fast, a third kills it.

    `commands`: None means those of `commands_of`. `before_servers` is called before the servers start, after the
    leftovers of a killed `trueup up` have ended; `before_commands` when the servers answer, to migrate. `policy`: None
    means its defaults. `output`: None means standard output. Raises `StackAlreadyRunningError`, `StackError` when a
    server can't run, and `ChildFailedError` when a process dies too often.
    """
    policy = policy or Policy()
    layout = prepare_layout(settings)
    known = commands if commands is not None else stack_commands(layout.home)
    log = MergedLog(output or sys.stdout, [command.name for command in known])
    with _only_one(layout), _stop_requests() as requests:
        records = ChildRecords(layout.run / "children.json")
        # First of all, so that old workers never share the queues with new ones.
        reap_leftovers(records, layout.home, policy.grace_seconds, log.say)
        if before_servers:
            before_servers()
        table = commands if commands is not None else commands_of(settings, layout.home)
        with leased_stack(settings) as (urls, leases):
            log.say(f"PostgreSQL and Redis are ready (home: {layout.home})")
            if commands is None:
                log.say(about_the_model(settings))
                log.say(about_the_api(settings, is_served=any(command.name == API for command in table)))
            if before_commands:
                before_commands(urls)
            environment = _environment(layout.home, urls) | embedded_settings(settings) | page_settings(settings)
            supervisor = _Supervisor(table, environment, records, log, policy, _ready_when(settings, table))
            with explained("trueup up", layout.home):
                supervisor.run(requests, leases)
        log.say("stopped")


def commands_of(settings: Settings, home: Path) -> Sequence[Command]:
    """Return the processes that `trueup up` runs: the whole table, but the API only if it has something to serve.

    The stack runs on if the API that serves the page alone can't: its address may be taken meanwhile.
    """
    page_alone = not settings.api.has_key and not settings.api.demo
    return [
        replace(command, is_optional=page_alone) if command.name == API else command
        for command in stack_commands(home)
        if command.name != API or serves_api(settings)
    ]


def serves_api(settings: Settings) -> bool:
    """Return whether the stack serves the API: it has a key, is a demo, or can serve its page to this machine.

    The page alone is not worth refusing to start: it needs the extra [api], and an address that no program uses.
    """
    api = settings.api
    if api.has_key or api.demo:
        return True
    return bool(api.local_page or page_settings(settings)) and not missing_modules("api") and _is_free(settings)


def _is_free(settings: Settings) -> bool:
    try:
        socket.create_connection(settings.api.local_address, _TRY_SECONDS).close()
    except OSError:
        return True
    return False


def about_the_model(settings: Settings) -> str:
    """Return a log line: which model provider answers AI tasks."""
    if embedded_settings(settings):
        return (
            "model provider: offline, so answers are made up. For real answers set TRUEUP_MODEL_PROVIDER=openai and "
            "TRUEUP_OPENAI_API_KEY"
        )
    if settings.model_provider is None:
        return "model provider: none. AI tasks fail until TRUEUP_MODEL_PROVIDER is set (see `trueup settings`)"
    return f"model provider: {settings.model_provider}"


def about_the_api(settings: Settings, *, is_served: bool) -> str:
    """Return a log line: the API's URL, or why it is not served."""
    if not is_served:
        return f"the HTTP API and its page are not served: {_obstacle(settings)}"
    if not settings.api.has_key and not settings.api.demo:
        return (
            "the page is served to this machine alone, and the HTTP API takes no token, because there is no key to "
            "verify tokens. Set TRUEUP_API__JWT_SECRET, or to try the API TRUEUP_API__DEMO=true"
        )
    demo = "; demo: the bearer token is the user id, without authentication" if settings.api.demo else ""
    return f"the HTTP API will be at http://{settings.api.host}:{settings.api.port}{demo}"


def _obstacle(settings: Settings) -> str:
    """Return why the page is not served, and what to do."""
    api = settings.api
    if not api.local_page and not page_settings(settings):
        return (
            f"there is no key to verify tokens, and {api.host} is more than this machine. Set TRUEUP_API__JWT_SECRET "
            "(see `trueup api --help`)"
        )
    if missing_modules("api"):
        return "the extra [api] is not installed. Install it: pip install 'trueup[api]'"
    return f"another program uses {api.host}:{api.port}. Set TRUEUP_API__PORT to a free port, and start again"


@contextmanager
def _only_one(layout: Layout) -> Iterator[None]:
    """Hold the home's up lock. Raises `StackAlreadyRunningError` when another process holds it."""
    path = layout.run / "up.lock"
    lock = FileLock(path)
    try:
        with explained("trueup up", path):
            if not lock.try_exclusive():
                raise StackAlreadyRunningError(str(layout.home), _pid_in(path))
            path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def _pid_in(path: Path) -> int | None:
    """Return the holder's pid. None: it has the lock but has not written its pid yet."""
    with suppress(OSError, ValueError):
        pid = int(path.read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def _environment(home: Path, urls: StackUrls) -> dict[str, str]:
    added = {
        "TRUEUP_HOME": str(home),
        "TRUEUP_DATABASE_URL": urls.database_url,
        "TRUEUP_BROKER_URL": urls.broker_url,
        "PYTHONUNBUFFERED": "1",  # else lines arrive in blocks
    }
    return dict(os.environ) | {name: value for name, value in added.items() if value}


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP in a list. Main thread only.

    The handlers never raise, so that no start and no stop is interrupted half-way.
    """
    requests: list[int] = []

    def add(number: int, _frame: FrameType | None) -> None:
        requests.append(number)

    previous = {kind: signal.signal(kind, add) for kind in _STOP_SIGNALS}
    try:
        yield requests
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


class MergedLog:
    """One stream for the lines of many processes. Each line starts with its process's name, coloured on a terminal."""

    def __init__(self, stream: TextIO, names: Sequence[str]) -> None:
        self._stream = stream
        self._width = max(len(name) for name in (_OWN_NAME, *names))
        coloured = stream.isatty() and "NO_COLOR" not in os.environ
        self._colours = dict(zip(names, _COLOURS * len(names), strict=False)) if coloured else {}
        self.closed = False

    def write(self, name: str, lines: Sequence[str]) -> None:
        """Write the lines of one process. When the stream's reader has ended, they are dropped."""
        if self.closed or not lines:
            return
        prefix = f"{name:<{self._width}} |"
        if name in self._colours:
            prefix = f"\x1b[{self._colours[name]}m{prefix}\x1b[0m"
        try:
            self._stream.write("".join(f"{prefix} {line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is closed, or the reader of the pipe has ended
            self.closed = True

    def say(self, message: str) -> None:
        """Write a message of the supervisor itself."""
        self.write(_OWN_NAME, message.splitlines())


@dataclass(slots=True)
class _Slot:
    """One command and its current process. `restart_at` says when to start one, by the monotonic clock."""

    command: Command
    child: Child | None = None
    restart_at: float = 0
    failures: list[float] = field(default_factory=list)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=8))


@dataclass(slots=True)
class _Ready:
    """The address at which the page is served, tried each second until a program listens there."""

    url: str
    address: tuple[str, int]
    try_at: float = 0

    def is_reached(self) -> bool:
        if time.monotonic() < self.try_at:
            return False
        self.try_at = time.monotonic() + _TRY_SECONDS
        try:
            socket.create_connection(self.address, _TRY_SECONDS).close()
        except OSError:
            return False
        return True


def _ready_when(settings: Settings, commands: Sequence[Command]) -> _Ready | None:
    """Return what to wait for before the stack is called ready; None: it serves no page."""
    if not any(command.name == API for command in commands):
        return None
    return _Ready(url=settings.api.local_url, address=settings.api.local_address)


class _Supervisor:
    """Runs the commands until a stop request, and restarts dead ones."""

    def __init__(
        self,
        commands: Sequence[Command],
        environment: Mapping[str, str],
        records: ChildRecords,
        log: MergedLog,
        policy: Policy,
        ready: "_Ready | None" = None,
    ) -> None:
        self._ready = ready
        self._slots = [_Slot(command) for command in commands]
        self._environment = environment
        self._records = records
        self._log = log
        self._policy = policy
        self._selector = selectors.DefaultSelector()
        self._stage = 0  # of the stop: the number of requests that were handled
        self._kill_at: float | None = None
        self._failed: ChildFailedError | None = None

    def run(self, requests: Sequence[int], leases: Sequence[Lease]) -> None:
        """Run until `requests` has an entry, or a process dies too often, which raises `ChildFailedError`.

        Until then the servers of `leases` are restarted when they die.
        """
        tend_at = time.monotonic() + _TEND_SECONDS
        try:
            while True:
                self._handle_requests(len(requests))
                if not self._stage:
                    self._start_due()
                    if self._ready is not None and self._ready.is_reached():
                        self._log.say(f"ready: {self._ready.url}")
                        self._ready = None
                    if time.monotonic() >= tend_at:
                        self._revive(leases)
                        tend_at = time.monotonic() + _TEND_SECONDS
                elif not any(slot.child for slot in self._slots):
                    break
                self._relay_output()
                self._collect_ended()
        finally:
            # If an error of our own ended the loop, children still run.
            for slot in self._slots:
                if slot.child:
                    slot.child.reap()
                    slot.child.close()
                    self._records.remove(slot.child.pid)
            self._selector.close()
        if self._failed:
            raise self._failed

    def _start_due(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.child is None and slot.restart_at <= now:
                slot.child = Child(start_child(slot.command, self._environment, self._records))
                self._selector.register(slot.child.output, selectors.EVENT_READ, slot)
                self._log.say(f"{slot.command.name} started (process {slot.child.pid})")

    def _revive(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            if lease.revive():
                self._log.say(f"{lease.service} had died and was started again; its log says why")

    def _relay_output(self) -> None:
        for key, _events in self._selector.select(_TICK_SECONDS):
            slot: _Slot = key.data
            if slot.child:
                self._print(slot, slot.child.lines())
                if slot.child.output_ended:  # else the selector reports the end again and again
                    self._selector.unregister(slot.child.output)

    def _print(self, slot: _Slot, lines: Sequence[str]) -> None:
        slot.last_lines.extend(lines)
        self._log.write(slot.command.name, lines)

    def _collect_ended(self) -> None:
        for slot in self._slots:
            child = slot.child
            if child and child.has_ended():
                code = child.reap()
                if not child.output_ended:
                    self._selector.unregister(child.output)
                self._print(slot, child.close())
                self._records.remove(child.pid)
                slot.child = None
                if self._stage:
                    self._log.say(f"{slot.command.name} has ended ({_describe(code)})")
                else:
                    self._plan_restart(slot, code)

    def _plan_restart(self, slot: _Slot, code: int) -> None:
        policy, now, name = self._policy, time.monotonic(), slot.command.name
        slot.failures = [then for then in slot.failures if now - then < policy.failure_window_seconds] + [now]
        count = len(slot.failures)
        if count >= policy.failures_allowed and slot.command.is_optional:
            slot.restart_at = float("inf")
            self._ready = None
            self._log.say(f"{name} died {count} times ({_describe(code)}) and is not started again; its lines say why")
            return
        if count >= policy.failures_allowed:
            lines = "\n".join(slot.last_lines)
            self._failed = self._failed or ChildFailedError(
                name,
                " ".join(slot.command.tokens),
                f"it died {count} times within {policy.failure_window_seconds:.0f} s "
                f"(the last time: {_describe(code)}). Its last lines:\n{lines}\n",
                "The whole stack was stopped. Correct the cause, then start it again.",
            )
            return
        pause = min(policy.first_pause_seconds * 2 ** (count - 1), policy.longest_pause_seconds)
        slot.restart_at = now + pause
        self._log.say(
            f"{name} died ({_describe(code)}), {count} of {policy.failures_allowed} times allowed; "
            f"starting it again in {pause:g} s"
        )

    def _handle_requests(self, count: int) -> None:
        """Enter the next stage of the stop: after a request, after a failure, or when the time of a stage is over."""
        asked = max(count, 1 if self._failed or self._log.closed else 0)
        overdue = self._kill_at is not None and time.monotonic() >= self._kill_at
        children = [slot.child for slot in self._slots if slot.child]
        if overdue or asked >= 3 > self._stage:
            self._stage, self._kill_at = 3, None
            self._log.say("killing what still runs")
            for child in children:
                child.kill_group()
        elif asked > self._stage:
            self._stage = asked
            # SIGQUIT is Celery's cold shutdown: the worker requeues unfinished tasks and ends.
            number = signal.SIGTERM if asked == 1 else signal.SIGQUIT
            seconds = self._policy.grace_seconds if asked == 1 else self._policy.fast_seconds
            self._kill_at = time.monotonic() + seconds
            self._log.say(f"stopping; {seconds:.0f} s at most. Press Ctrl-C again to stop faster")
            for child in children:
                child.signal(number)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
