"""The supervised processes: their lines merged, their deaths noticed, their stop graceful."""

import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from trueup.stack.errors import ChildFailedError
from trueup.stack.records import ChildRecords
from trueup.stack.supervisor.children import Child, start_child
from trueup.stack.supervisor.commands import Command
from trueup.stack.supervisor.merged_log import MergedLog
from trueup.stack.supervisor.signals import StopRequests

_TICK_SECONDS = 0.1
_TEND_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How patient the supervisor is. Times are seconds."""

    grace_seconds: float = 45.0  # what a worker gets to finish its tasks after SIGTERM
    fast_seconds: float = 5.0  # what it gets after the second request, before SIGKILL
    failures_allowed: int = 5  # deaths within the window that end the whole stack
    failure_window_seconds: float = 60.0
    first_pause_seconds: float = 1.0  # before a restart; doubles with each failure in the window
    longest_pause_seconds: float = 15.0


@dataclass(slots=True)
class _Post:
    """One command and the process that fills it now; `restart_at` is set while there is none."""

    command: Command
    child: Child | None = None
    restart_at: float | None = None
    failures: list[float] = field(default_factory=list)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=8))


class Crew:
    """Runs the commands until told to stop, restarting those that die."""

    def __init__(
        self,
        commands: Sequence[Command],
        environment: Mapping[str, str],
        records: ChildRecords,
        log: MergedLog,
        policy: Policy,
    ) -> None:
        self._posts = [_Post(command) for command in commands]
        self._environment = dict(environment)
        self._records = records
        self._log = log
        self._policy = policy
        self._selector = selectors.DefaultSelector()
        self._stage = 0  # how many times we have been asked to stop
        self._kill_at: float | None = None
        self._failed: ChildFailedError | None = None

    def run(self, requests: StopRequests, tend: Callable[[], None]) -> None:
        """Run until `requests` counts one, or a process keeps dying: raises `ChildFailedError`.

        `tend` is called every few seconds until then, to look after what the processes need.
        """
        tend_at = time.monotonic() + _TEND_SECONDS
        try:
            while True:
                self._heed(requests)
                if not self._stage:
                    self._start_due()
                    if time.monotonic() >= tend_at:
                        tend()
                        tend_at = time.monotonic() + _TEND_SECONDS
                elif not any(post.child for post in self._posts):
                    break
                self._relay_output()
                self._notice_deaths()
        finally:
            self._abandon()
        if self._failed:
            raise self._failed

    def _start_due(self) -> None:
        now = time.monotonic()
        for post in self._posts:
            if post.child is None and (post.restart_at or 0) <= now:
                post.child = start_child(post.command, self._environment, self._records)
                self._selector.register(post.child.output, selectors.EVENT_READ, post)
                self._log.say(f"{post.command.name} started (process {post.child.pid})")

    def _relay_output(self) -> None:
        for key, _events in self._selector.select(_TICK_SECONDS):
            post: _Post = key.data
            if post.child:
                self._print(post, post.child.lines())
                if post.child.is_silent:  # or the selector would report the end again and again
                    self._selector.unregister(post.child.output)

    def _print(self, post: _Post, lines: Sequence[str]) -> None:
        post.last_lines.extend(lines)
        self._log.write(post.command.name, lines)

    def _notice_deaths(self) -> None:
        for post in self._posts:
            child = post.child
            if child and child.has_ended():
                code = child.reap()
                if not child.is_silent:
                    self._selector.unregister(child.output)
                self._print(post, child.close())
                self._records.remove(child.pid)
                post.child = None
                if self._stage:
                    self._log.say(f"{post.command.name} has ended ({_describe(code)})")
                else:
                    self._plan_restart(post, code)

    def _plan_restart(self, post: _Post, code: int) -> None:
        policy, now, name = self._policy, time.monotonic(), post.command.name
        recent = [then for then in post.failures if now - then < policy.failure_window_seconds]
        post.failures = [*recent, now]
        count = len(post.failures)
        if count >= policy.failures_allowed:
            words = "\n".join(post.last_lines)
            self._failed = self._failed or ChildFailedError(
                name,
                " ".join(post.command.tokens),
                f"it died {count} times within {policy.failure_window_seconds:.0f} s "
                f"(the last time: {_describe(code)}). Its last words were:\n{words}\n",
                "The stack was stopped. Correct the cause, then start it again.",
            )
            return
        pause = min(policy.first_pause_seconds * 2 ** (count - 1), policy.longest_pause_seconds)
        post.restart_at = now + pause
        self._log.say(
            f"{name} died ({_describe(code)}), {count} of {policy.failures_allowed} times allowed; "
            f"starting it again in {pause:g} s"
        )

    def _heed(self, requests: StopRequests) -> None:
        """Go on to the next stage of stopping when asked, when a process failed, or in time."""
        asked = max(requests.count, 1 if self._failed or self._log.closed else 0)
        overdue = self._kill_at is not None and time.monotonic() >= self._kill_at
        if overdue or asked >= 3 > self._stage:
            self._stage, self._kill_at = 3, None
            self._log.say("killing what still runs")
            for post in self._posts:
                if post.child:
                    post.child.kill_group()
        elif asked > self._stage:
            self._stage = asked
            # SIGQUIT is Celery's cold shutdown: give unfinished tasks back to the queue and end.
            number = signal.SIGTERM if asked == 1 else signal.SIGQUIT
            patience = self._policy.grace_seconds if asked == 1 else self._policy.fast_seconds
            self._kill_at = time.monotonic() + patience
            self._log.say(f"stopping; {patience:.0f} s at most. Once more to hurry")
            for post in self._posts:
                if post.child:
                    post.child.signal(number)

    def _abandon(self) -> None:
        """Leave nothing behind when an error of our own ends the loop."""
        for post in self._posts:
            if post.child:
                post.child.kill_group()
                post.child.reap()
                post.child.close()
                self._records.remove(post.child.pid)
        self._selector.close()


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
