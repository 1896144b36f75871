"""The checks of Redis, the workers and the queues, through a Celery application that sends trueup's tasks."""

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from celery import Celery

from trueup.doctor.clocks import Offset, judge, measure
from trueup.doctor.findings import Finding, error, ok, run_check, warning
from trueup.settings.settings import PREFIX, Settings
from trueup.tasks.queues import AI_QUEUE, RECONCILE_QUEUE, SENT_AT_HEADER
from trueup.worker.dead_letters import count_letters

OLDEST_REDIS = (6, 2)
UPKEEP_TASK = "trueup.reconcile_counters"
# A worker that forks, or on a busy machine, answers within this.
ANSWER_SECONDS = 2.0
LONG_QUEUE = 1000
LONG_WAIT_SECONDS = 600
# kombu keeps a list for each priority beside the plain one.
PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
# The oldest messages that are read: some of them may not be due yet, or were requeued.
SAMPLE = 20


def examine_broker(app: Celery, settings: Settings, database_offset: Offset | None) -> list[Finding]:
    """Return the findings about Redis and the workers. `database_offset` None: the database's clock is unknown."""
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        return [
            *run_check("redis", lambda: check_server(client)),
            *run_check("redis_clock", lambda: check_clock(client, database_offset)),
            *run_check("workers", lambda: check_workers(app, client, settings)),
            *run_check("dead_letters", lambda: check_dead_letters(client)),
        ]


def check_server(client: Any) -> Iterator[Finding]:
    """Check the server's version, and the settings by which it would lose tasks."""
    info = client.info()
    # Valkey reports the compatible Redis, 7.2.4 in all its versions, as redis_version.
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get(f"{name.lower()}_version", ""))
    detail = {"server": name, "version": version, "used_memory_bytes": info.get("used_memory")}
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST_REDIS:
        yield error("redis", f"{name} {version}.", "Use Redis or Valkey 6.2 or newer.", **detail)
    else:
        yield ok("redis", f"{name} {version}.", **detail)
    if info.get("cluster_enabled"):
        what = "This server is a node of a Redis Cluster: Celery's transactions fail on it."
        yield error("redis", what, "Use a single Redis, or Sentinels.", cluster_enabled=True)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        what = f"Redis' maxmemory-policy is {policy}: when memory is short, Redis deletes tasks."
        yield error("redis", what, "Set maxmemory-policy noeviction.", maxmemory_policy=policy)
    if not info.get("aof_enabled"):
        what = "Redis keeps no append-only file: a crash loses the tasks in its queues."
        yield warning("redis", what, "Set appendonly yes.")


def check_clock(client: Any, database_offset: Offset | None) -> Iterator[Finding]:
    """Compare Redis' clock with the database's, or with this machine's if the database's is unknown."""

    def read() -> float:
        seconds, microseconds = client.time()
        return float(seconds) + float(microseconds) / 1_000_000

    offset = measure(read)
    if database_offset is None:
        yield from judge("redis_clock", "Redis' clock and this machine's", offset)
    else:
        yield from judge("redis_clock", "Redis' clock and the database's", offset.against(database_offset))


def check_dead_letters(client: Any) -> Iterator[Finding]:
    """Yield whether messages are kept that no worker could work on."""
    letters = count_letters(client)
    if letters:
        yield warning(
            "dead_letters",
            f"{letters:,} messages could not be worked on, and are kept as dead letters.",
            "See why: `trueup queues dead`. Then `trueup queues requeue`, or `trueup queues drop`.",
            letters=letters,
        )
    else:
        yield ok("dead_letters", "There are no dead letters.", letters=0)


@dataclass(frozen=True, kw_only=True)
class QueueDepth:
    """The messages in a queue. `oldest_seconds`: how long the oldest has been due; None: unknown."""

    length: int
    oldest_seconds: float | None

    def __str__(self) -> str:
        oldest = "" if self.oldest_seconds is None else f", the oldest for {self.oldest_seconds:,.0f} s"
        return f"{self.length:,} tasks wait{oldest}"


def read_queue_depth(client: Any, queue: str) -> QueueDepth:
    """Count the messages in a queue without consuming any. `client`: a client of the redis package."""
    seconds, microseconds = client.time()
    now = datetime.fromtimestamp(seconds + microseconds / 1_000_000, UTC)
    length, ages = 0, []
    for priority in PRIORITIES:
        key = f"{queue}{priority}"
        length += int(client.llen(key))
        # kombu adds new messages at the left end.
        messages = (_headers_of(message) for message in client.lrange(key, -SAMPLE, -1))
        ages += [(now - since).total_seconds() for message in messages if (since := _due_since(message)) is not None]
    waited = [age for age in ages if age >= 0]
    # Clocks differ a little, so that a new message may seem to come from the future.
    return QueueDepth(length=length, oldest_seconds=max(waited, default=0.0 if ages else None))


def _headers_of(message: str | bytes) -> dict[str, Any]:
    """Return a message's headers; empty if it is not a task's."""
    try:
        headers = json.loads(message)["headers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return headers if isinstance(headers, dict) else {}


def _due_since(headers: dict[str, Any]) -> datetime | None:
    """Return the time at which a task became due; None: unknown, for example after a redelivery."""
    if headers.get("redelivered"):
        return None
    try:
        moments = [datetime.fromisoformat(at) for at in (headers[SENT_AT_HEADER], headers.get("eta")) if at]
        return max(moment.astimezone(UTC) for moment in moments)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def check_workers(app: Celery, client: Any, settings: Settings) -> Iterator[Finding]:
    """Check that workers answer and consume trueup's queues, and look for long queues and tasks that hang."""
    replies = app.control.broadcast("active_queues", reply=True, timeout=ANSWER_SECONDS) or []
    # Celery's `inspect` would give the queues of only one of several workers with the same node name.
    taken = [(worker, queues) for reply in replies for worker, queues in reply.items()]
    names = Counter(worker for worker, _ in taken)
    served = {queue["name"] for _, queues in taken for queue in queues}
    waiting = {queue: read_queue_depth(client, queue) for queue in (AI_QUEUE, RECONCILE_QUEUE)}
    if taken:
        yield ok("workers", f"Workers answer: {', '.join(sorted(names))}.", workers=sorted(names))
        yield from _same_names(names)
        active = app.control.broadcast("active", reply=True, timeout=ANSWER_SECONDS) or []
        yield from _hanging([item for reply in active for item in reply.items()], settings, time.time())
    else:
        what = f"No worker answered within {ANSWER_SECONDS:.0f} s."
        remedy = (
            "Start workers: `celery -A trueup.worker worker -Q trueup-ai -n trueup-ai@%h`, and another with "
            "`-Q trueup-reconcile -n trueup-reconcile@%h`."
        )
        yield error("workers", what, remedy, workers=[])
    if AI_QUEUE in served and settings.model_provider is None and settings.database_url:
        what = f"Workers consume queue {AI_QUEUE}, but no model provider is set: every AI task fails."
        remedy = f"Set {PREFIX}MODEL_PROVIDER for the workers, and restart the workers."
        yield error("workers", what, remedy, queue=AI_QUEUE)
    own = {worker for worker, queues in taken if {queue["name"] for queue in queues} - {AI_QUEUE, RECONCILE_QUEUE}}
    for queue, found in waiting.items():
        may_idle = not taken or queue == AI_QUEUE or (queue not in served and _do_upkeep(app, own))
        yield _queue(queue, found, served=queue in served, may_idle=may_idle)


def _do_upkeep(app: Celery, workers: Collection[str]) -> bool:
    """Return whether one of these workers of the host has the upkeep's tasks, by `trueup.add_upkeep`."""
    replies = app.control.broadcast("registered", reply=True, timeout=ANSWER_SECONDS) if workers else None
    named = [(worker, names) for reply in replies or [] for worker, names in reply.items()]
    return any(worker in workers and UPKEEP_TASK in names for worker, names in named)


def _queue(queue: str, waiting: QueueDepth, *, served: bool, may_idle: bool) -> Finding:
    """Return the finding about a queue. `may_idle`: that no worker consumes it is no fault, or another finding's."""
    detail = {"queue": queue, "served": served, **asdict(waiting)}
    start = f"Start a worker for it: `celery -A trueup.worker worker -Q {queue} -n {queue}@%h`."
    if queue == RECONCILE_QUEUE and not waiting.length:
        start += " Or call `trueup.add_upkeep(app)` in your application."
    if waiting.length and not served:
        return error("queues", f"In queue {queue} {waiting}, and no worker consumes it.", start, **detail)
    if waiting.length >= LONG_QUEUE or (waiting.oldest_seconds or 0) >= LONG_WAIT_SECONDS:
        remedy = "Start more workers for the queue, or find out why they are slow."
        return warning("queues", f"In queue {queue} {waiting}.", remedy, **detail)
    if not served and not may_idle:
        what = f"No worker consumes queue {queue}: no scheduled reconcile run takes place."
        return warning("queues", what, start, **detail)
    return ok("queues", f"In queue {queue} {waiting}.", **detail)


def _same_names(names: Mapping[str, int]) -> Iterator[Finding]:
    """Find node names that several workers have: Celery's remote control and events mix up such workers."""
    for name, workers in sorted(names.items()):
        if workers > 1:
            what = f"{workers} workers have the node name {name}: `celery inspect` and revocations mix them up."
            remedy = "Start each worker with its own name: `-n trueup-ai@%h` and `-n trueup-reconcile@%h`."
            yield warning("workers", what, remedy, worker=name, workers=workers)


def _hanging(active: Iterable[tuple[str, list[dict[str, Any]]]], settings: Settings, now: float) -> Iterator[Finding]:
    """Look for a task that runs longer than the time limit: a worker whose processes hang still answers."""
    limit = settings.task_time_limit_seconds + settings.reconcile_scan_timeout_seconds
    started = [
        (now - float(task["time_start"]), task.get("name"), worker, task.get("id"))
        for worker, tasks in active
        for task in tasks
        if task.get("time_start")
    ]
    if not started:
        return
    seconds, name, worker, task_id = max(started)
    detail = {"task": name, "task_id": task_id, "worker": worker, "seconds": round(seconds)}
    if seconds > limit:
        what = f"Task {name} has been running on {worker} for {seconds:.0f} s, longer than the time limit."
        remedy = "Restart that worker: Redis redelivers its tasks, and they continue with their holds."
        yield error("tasks", what, remedy, **detail)
    else:
        yield ok("tasks", f"{len(started)} tasks are running, the oldest for {max(seconds, 0):.0f} s.", **detail)
