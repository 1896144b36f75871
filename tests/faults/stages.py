"""The stages of a round: played, settled, checked."""

import heapq
import itertools
import json
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from tests.faults.audit import Audit, auditing
from tests.faults.books import Books, read_books
from tests.faults.checks import violations as find_violations
from tests.faults.graph import FakeGraph
from tests.faults.injections import INJECTIONS
from tests.faults.planned import PlannedTask
from tests.faults.plans import Fault, RoundPlan
from tests.faults.provider import FakeProvider
from tests.faults.servers import Servers
from tests.faults.violations import DONE, NO_RESULT, UNENDED, UNFINISHED, WAITING, Violation
from tests.faults.workers import Worker
from trueup.gate.holds import expire_holds

QUEUE = "trueup-ai"
BOOT_SECONDS = 90.0
# The longest time for a round to settle without any progress, and in total.
QUIET_SECONDS = 25.0
SETTLE_SECONDS = 90.0
FLOOD_FACTOR = 4
# How often a fault looks for something to strike, and how often while messages are left.
STRIKE_TRIES = 8
MAX_STRIKE_TRIES = 25
# How long a request that uses an id again waits for the end of an earlier one.
AFTER_SECONDS = 15.0
SWEEP_SECONDS = 0.5
CALM_SECONDS = 4.0
_TICK_SECONDS = 0.03


@dataclass(frozen=True, kw_only=True)
class Injected:
    """A fault that struck, and its time in seconds after the round's start."""

    kind: str
    at: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.at:5.2f} s  {self.kind}{f' ({self.detail})' if self.detail else ''}"


@dataclass(kw_only=True)
class Stage:
    """The state of a round.

    `users`: ids by their number in the plan. `outcomes`: by task id; `results`: of the completed tasks. `killed`:
    by pid, the time at which a process was killed that may have been at work. `stopped`: the processes that were
    suspended for a time. `sent_after`: the requests that were sent when an earlier one with their id had its result.
    """

    plan: RoundPlan
    servers: Servers
    database: str
    engine: Engine
    provider: FakeProvider
    graph: FakeGraph
    workers: list[Worker]
    sender: Celery
    users: list[int] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    sent_after: set[str] = field(default_factory=set)
    flushed: bool = False
    settled: bool = False
    messages_left: int = 0
    started_at: float = 0.0
    audit: Audit = field(default_factory=Audit)
    _swept_at: float = 0.0
    _agenda: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Put an action on the round's agenda."""
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._order), action))

    def note(self, kind: str, detail: str = "") -> None:
        self.injected.append(Injected(kind=kind, at=time.monotonic() - self.started_at, detail=detail))

    def play(self) -> None:
        """Send the tasks, and let the faults strike at their times."""
        self._wait_until_ready()
        self.started_at = time.monotonic()
        if self.plan.skew_seconds:
            self.note("clock_skewed", f"{self.plan.skew_seconds:+g} s")
        for task in self.plan.tasks:
            self.later(task.at, lambda task=task: self._send(task))
        for fault in self.plan.faults:
            self.later(fault.at, lambda fault=fault: self._strike(fault))
        with auditing(self.engine, self.audit):
            while self._agenda:
                if self._agenda[0][0] <= time.monotonic():
                    heapq.heappop(self._agenda)[2]()
                else:
                    self._supervise()
                    time.sleep(_TICK_SECONDS)

    def settle(self) -> None:
        """Wait until no message is left and no worker works. Then end the workers and read how the tasks ended."""
        patience = _Patience()
        calm_since: float | None = None
        with self.servers.redis(redis_number(self.plan)) as client:
            while not self.settled and not self._flooded(client) and patience.lasts(self._signs_of_life(client)):
                self._supervise()
                if not self._calm(client):
                    calm_since = None
                elif calm_since is None:
                    calm_since = time.monotonic()
                # A hold may remain that no message will ever close. It expires, so do not wait for it.
                elif self._open_holds() == 0 or time.monotonic() - calm_since > CALM_SECONDS:
                    self.settled = True
                time.sleep(2 * _TICK_SECONDS)
            self.messages_left = self._messages(client)
            self._end_workers()
            for task in self.plan.tasks:
                self.outcomes[task.task_id], result = _outcome(client, task.task_id)
                if self.outcomes[task.task_id] == DONE:
                    self.results[task.task_id] = result

    def _end_workers(self) -> None:
        """End the workers. This explains an unrecorded call only for workers that may still have been at work."""
        if self.settled and not self.flushed:
            self.killed = self._killed()
        for worker in self.workers:
            worker.kill()
        if not self.settled or self.flushed:
            self.killed = self._killed()

    def _killed(self) -> dict[int, float]:
        return {pid: at for worker in self.workers for pid, at in worker.killed.items()}

    def judge(self) -> tuple[Books, list[Violation]]:
        """Compare the books with the ledgers. The workers have ended."""
        books = read_books(self)
        return books, find_violations(self, books)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while not all(worker.at_work for worker in self.workers):
            assert time.monotonic() < deadline, f"a worker is not ready: {[w.log for w in self.workers]}"
            self._supervise()
            assert not any(worker.crashes for worker in self.workers), self.workers
            time.sleep(_TICK_SECONDS)

    def _send(self, task: PlannedTask) -> None:
        """Send a task as the host does. If the broker is not available, try again a little later."""
        try:
            if task.after and self._waits_for_earlier(task):
                return
            for copy in range(task.copies):
                arguments = task.arguments(self.users[task.user])
                self.sender.send_task(task.name, kwargs=arguments, task_id=task.task_id, queue=QUEUE, retry=False)
                if copy:
                    self.note("duplicate_delivery", task.task_id)
        except (OperationalError, redis.ConnectionError):
            self.later(0.3, lambda: self._send(task))

    def _waits_for_earlier(self, task: PlannedTask) -> bool:
        """Put the task on the agenda again while an earlier request with its id has no result. Waits not for ever."""
        with self.servers.redis(redis_number(self.plan)) as client:
            ended = _outcome(client, task.task_id)[0] not in UNENDED
        if ended:
            self.sent_after.add(task.label)
        waits = not ended and time.monotonic() - self.started_at < AFTER_SECONDS
        if waits:
            self.later(0.3, lambda: self._send(task))
        return waits

    def _strike(self, fault: Fault, tries: int = 0) -> None:
        """Let a fault strike. If it finds nothing to strike, try again a little later.

        Only a try beside a worker that takes tasks counts: on a busy machine a worker boots for longer than all tries.
        """
        at = len(self.injected)
        counts = any(worker.at_work for worker in self.workers)
        self.note(fault.kind)
        if not INJECTIONS[fault.kind](self, fault):
            del self.injected[at]
            if self._may_find(tries + counts):
                self.later(0.3, lambda: self._strike(fault, tries + counts))

    def _may_find(self, tries: int) -> bool:
        """Return whether a fault that found nothing in `tries` tries may still find something to strike."""
        if time.monotonic() - self.started_at > BOOT_SECONDS:
            return False
        if tries < STRIKE_TRIES:
            return True
        with suppress(redis.ConnectionError), self.servers.redis(redis_number(self.plan)) as client:
            return tries < MAX_STRIKE_TRIES and self._messages(client) > 0
        return False

    def _supervise(self) -> None:
        """Start workers that ended by themselves. The agenda starts the killed ones; when it is done, this does too."""
        for worker in self.workers:
            if not self._agenda or (not worker.alive and worker.crashed):
                worker.revive()
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            # As the upkeep worker does. The database may be away.
            with suppress(DBAPIError), self.engine.begin() as connection:
                expire_holds(connection)

    def _calm(self, client: redis.Redis) -> bool:
        in_flight = self.provider.ledger.in_flight() or self.graph.ledger.in_flight()
        return not self._messages(client) and not in_flight

    def _flooded(self, client: redis.Redis) -> bool:
        """Return whether messages multiply without end."""
        return self._messages(client) > FLOOD_FACTOR * sum(task.copies for task in self.plan.tasks)

    def _signs_of_life(self, client: redis.Redis) -> Hashable:
        """Return a value that differs between two times if a worker has done something in between."""
        requests = len(self.provider.ledger.servings()), len(self.graph.ledger.postings())
        in_flight = len(self.provider.ledger.in_flight()), len(self.graph.ledger.in_flight())
        return self._messages(client), requests, in_flight, client.dbsize()

    def _messages(self, client: redis.Redis) -> int:
        """Count the messages in the queue and the unacknowledged ones."""
        # The index, not the hash beside it: a flush at the wrong moment leaves an entry in the hash for ever.
        return int(client.llen(QUEUE)) + int(client.zcard("unacked_index"))  # type: ignore[arg-type]

    def _open_holds(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(text("SELECT count(*) FROM trueup.hold WHERE status = 'open'")) or 0


class _Patience:
    """Return whether to wait longer: something still happens, and the limit is not reached."""

    def __init__(self) -> None:
        self._end = time.monotonic() + SETTLE_SECONDS
        self._quiet_since = time.monotonic()
        self._seen: Hashable = None

    def lasts(self, signs: Hashable) -> bool:
        now = time.monotonic()
        if signs != self._seen:
            self._seen, self._quiet_since = signs, now
        return now < self._end and now - self._quiet_since < QUIET_SECONDS


def redis_number(plan: RoundPlan) -> int:
    """Return the round's database of Redis. The next round's workers already start while this one settles."""
    return 1 + plan.number % 2


def _outcome(client: redis.Redis, task_id: str) -> tuple[str, Any]:
    """Return how a task ended: its result, or that it has none."""
    stored: Any = client.get(f"celery-task-meta-{task_id}")
    if stored is None:
        return NO_RESULT, None
    meta = json.loads(stored)
    if meta["status"] == "SUCCESS":
        return DONE, meta["result"]
    if meta["status"] != "FAILURE":
        return WAITING if meta["status"] == "RETRY" else UNFINISHED, None
    return str(meta["result"].get("exc_type", "failed")), None
