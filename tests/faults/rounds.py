"""One round: made ready, played, settled, judged."""

import heapq
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, text

from tests.faults.audit import Audit, auditing
from tests.faults.checks import Books, Violation, read_books
from tests.faults.checks import violations as find_violations
from tests.faults.injections import HOLD_TTL_SECONDS, INJECTIONS
from tests.faults.plans import VISIBILITY_SECONDS, Fault, PlannedTask, RoundPlan
from tests.faults.provider import MODEL_NAME, MODEL_TIMEOUT_SECONDS, FakeProvider, running_provider
from tests.faults.servers import Servers
from tests.faults.workers import Worker
from tests.support.host import Host

TASK = "faults.spend"
QUEUE = "ai"
BOOT_SECONDS = 90.0
SETTLE_SECONDS = 25.0
STRIKE_TRIES = 8
CALM_SECONDS = 4.0
_TICK_SECONDS = 0.03


@dataclass(frozen=True, kw_only=True)
class Injected:
    """A fault that struck, and when: seconds from the start of the round."""

    kind: str
    at: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.at:5.2f} s  {self.kind}{f' ({self.detail})' if self.detail else ''}"


@dataclass(kw_only=True)
class Stage:
    """Everything a round plays with. `users`: ids by their number in the plan. `outcomes`: by task id.

    `killed`: when each process was killed while it may have been at work, by pid.
    """

    plan: RoundPlan
    servers: Servers
    database: str
    engine: Engine
    provider: FakeProvider
    workers: list[Worker]
    sender: Celery
    users: list[int] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    flushed: bool = False
    settled: bool = False
    messages_left: int = 0
    started_at: float = 0.0
    audit: Audit = field(default_factory=Audit)
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
        """Wait until no message is left and nobody works; then end the workers and read how the tasks ended."""
        deadline = time.monotonic() + SETTLE_SECONDS
        calm_since: float | None = None
        with self.servers.redis(_redis_number(self.plan)) as client:
            while time.monotonic() < deadline and not self.settled:
                self._supervise()
                if not self._calm(client):
                    calm_since = None
                elif calm_since is None:
                    calm_since = time.monotonic()
                # A hold may be left that no message will ever close; it expires, and is not waited for.
                elif self._open_holds() == 0 or time.monotonic() - calm_since > CALM_SECONDS:
                    self.settled = True
                time.sleep(2 * _TICK_SECONDS)
            self.messages_left = self._messages(client)
            self._end_workers()
            self.outcomes = {task.task_id: _outcome(client, task.task_id) for task in self.plan.tasks}

    def _end_workers(self) -> None:
        """End them; that explains a call that was not recorded only where somebody may still have been at work."""
        if self.settled and not self.flushed:
            self.killed = self._killed()
        for worker in self.workers:
            worker.kill()
        if not self.settled or self.flushed:
            self.killed = self._killed()

    def _killed(self) -> dict[int, float]:
        return {pid: at for worker in self.workers for pid, at in worker.killed.items()}

    def judge(self) -> tuple[Books, list[Violation]]:
        """Hold the books against the ledger. The workers have ended."""
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
        """Send a task as the host does; when the broker is away, again a little later."""
        try:
            for copy in range(task.copies):
                self.sender.send_task(
                    TASK, kwargs=self._arguments(task), task_id=task.task_id, queue=QUEUE, retry=False
                )
                if copy:
                    self.note("duplicate_delivery", task.task_id)
        except OperationalError:
            self.later(0.3, lambda: self._send(task))

    def _arguments(self, task: PlannedTask) -> dict[str, Any]:
        return {
            "user_id": self.users[task.user],
            "label": task.task_id,
            "tokens": task.tokens,
            "calls": task.calls,
            "words": task.words,
            "seconds": task.seconds,
            "cap": task.cap,
        }

    def _strike(self, fault: Fault, tries: int = STRIKE_TRIES) -> None:
        """Let a fault strike; when nothing was there to be struck, again a little later."""
        at = len(self.injected)
        self.note(fault.kind)
        if not INJECTIONS[fault.kind](self, fault):
            del self.injected[at]
            if tries > 1:
                self.later(0.3, lambda: self._strike(fault, tries - 1))

    def _supervise(self) -> None:
        """Start workers that ended by themselves. Those we killed are on the agenda; once it is done, here too."""
        for worker in self.workers:
            if not self._agenda or (not worker.alive and worker.crashed):
                worker.revive()

    def _calm(self, client: redis.Redis) -> bool:
        return not self._messages(client) and not self.provider.ledger.in_flight()

    def _messages(self, client: redis.Redis) -> int:
        """Count the messages in the queue, and those that a worker has."""
        # The index, not the hash beside it: a flush at the wrong moment leaves an entry in the hash for ever.
        return int(client.llen(QUEUE)) + int(client.zcard("unacked_index"))  # type: ignore[arg-type]

    def _open_holds(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(text("SELECT count(*) FROM trueup.hold WHERE status = 'open'")) or 0


@contextmanager
def staged(plan: RoundPlan, servers: Servers, logs: Path) -> Iterator[Stage]:
    """Give a round its database, users, provider and workers, which boot meanwhile; end them all at the end."""
    database = f"faults_{plan.number}"
    with ExitStack() as stack:
        stack.callback(servers.drop_database, database)
        servers.make_database(database)
        engine = servers.engine(database)
        stack.callback(engine.dispose)
        provider = stack.enter_context(running_provider(plan.serving))
        sender = stack.enter_context(_sender(servers.broker_url(_redis_number(plan))))
        stage = Stage(
            plan=plan, servers=servers, database=database, engine=engine, provider=provider, workers=[], sender=sender
        )
        stage.users = _sign_up(engine, plan.budgets)
        with servers.redis(_redis_number(stage.plan)) as client:
            client.flushdb()
        environment = _environment(stage)
        for number in range(plan.workers):
            worker = Worker(
                name=f"r{plan.number}w{number}",
                log=logs / f"round-{plan.number}-worker-{number}.log",
                environment=environment,
                concurrency=plan.concurrency,
                skew_seconds=0.0 if number else plan.skew_seconds,
            )
            stack.callback(worker.kill)
            stage.workers.append(worker)
            worker.start()
        yield stage


def _redis_number(plan: RoundPlan) -> int:
    """The next round's workers start while this one settles: each has a database of Redis of its own."""
    return 1 + plan.number % 2


@contextmanager
def _sender(broker_url: str) -> Iterator[Celery]:
    """Give the host's side of Celery: it sends, and waits for no results."""
    with Celery("faults", broker=broker_url, set_as_current=False) as app:
        app.conf.update(task_ignore_result=True)
        yield app


def _sign_up(engine: Engine, budgets: tuple[int, ...]) -> list[int]:
    with Host(engine) as host:
        return [host.subscriber(tokens, start=datetime.now(UTC) - timedelta(days=1)) for tokens in budgets]


def _environment(stage: Stage) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("TRUEUP_", "OPENAI_"))}
    return outside | {
        "TRUEUP_HOME": str(stage.servers.home),
        "TRUEUP_DATABASE_URL": stage.servers.database_url(stage.database),
        "TRUEUP_BROKER_URL": stage.servers.broker_url(_redis_number(stage.plan)),
        "TRUEUP_HOLD_TTL_SECONDS": str(HOLD_TTL_SECONDS),
        "TRUEUP_VISIBILITY_TIMEOUT_SECONDS": str(max(5, VISIBILITY_SECONDS)),
        "TRUEUP_GATE_RETRY_MAX_SECONDS": "1",
        "TRUEUP_MODEL_PROVIDER": "openai",
        "TRUEUP_MODEL_NAME": MODEL_NAME,
        "TRUEUP_MODEL_TIMEOUT_SECONDS": str(MODEL_TIMEOUT_SECONDS),
        "TRUEUP_OPENAI_BASE_URL": stage.provider.url,
        "TRUEUP_DATABASE_POOL_SIZE": "2",
    }


def _outcome(client: redis.Redis, task_id: str) -> str:
    """Say how a task ended: by its result, or that it has none."""
    stored: Any = client.get(f"celery-task-meta-{task_id}")
    if stored is None:
        return "no result"
    meta = json.loads(stored)
    if meta["status"] == "SUCCESS":
        return "done"
    if meta["status"] != "FAILURE":
        return "unfinished"
    return str(meta["result"].get("exc_type", "failed"))
