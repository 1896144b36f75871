"""The checks that ask Redis and the workers, through the application that sends trueup's tasks."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from celery import Celery

from trueup.doctor.clocks import Offset, judge, measure
from trueup.doctor.findings import Finding, error, ok, run_check, warning
from trueup.settings.settings import PREFIX, Settings
from trueup.tasks.queues import AI_QUEUE, RECONCILE_QUEUE
from trueup.worker.dead_letters import count_letters
from trueup.worker.queue_depth import QueueDepth, read_queue_depth

OLDEST_REDIS = (6, 2)
# A worker in the middle of a fork, or on a busy machine, answers within this.
ANSWER_SECONDS = 2.0
LONG_QUEUE = 1000
LONG_WAIT_SECONDS = 600


def examine_broker(app: Celery, settings: Settings, database_offset: Offset | None) -> list[Finding]:
    """Return what Redis and the workers show. `database_offset` None: the database's clock is not known."""
    checks: list[tuple[str, Callable[[Any], Iterable[Finding]]]] = [
        ("redis", check_server),
        ("redis_clock", lambda client: check_clock(client, database_offset)),
        ("workers", lambda client: check_workers(app, client, settings)),
        ("dead_letters", check_dead_letters),
    ]
    found: list[Finding] = []
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        for name, check in checks:
            found += run_check(name, lambda check=check: check(client))  # type: ignore[misc]
    return found


def check_server(client: Any) -> Iterator[Finding]:
    """Yield the server's name and version, and the settings of it by which tasks are lost."""
    info = client.info()
    # Valkey reports as redis_version the Redis that it is compatible with, 7.2.4 for all its versions.
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get(f"{name.lower()}_version", ""))
    detail = {"server": name, "version": version, "used_memory_bytes": info.get("used_memory")}
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST_REDIS:
        yield error("redis", f"{name} {version}.", "Use Redis or Valkey 6.2 or newer.", **detail)
    else:
        yield ok("redis", f"{name} {version}.", **detail)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield error(
            "redis",
            f"Redis' maxmemory-policy is {policy}: when memory is short it throws tasks away.",
            "Set maxmemory-policy noeviction.",
            maxmemory_policy=policy,
        )
    if not info.get("aof_enabled"):
        yield warning(
            "redis",
            "Redis keeps no append-only file: tasks in its queues are gone when it crashes.",
            "Set appendonly yes.",
        )


def check_clock(client: Any, database_offset: Offset | None) -> Iterator[Finding]:
    """Yield how far Redis' clock is from the database's, and from this machine's if that is not known."""

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


def check_workers(app: Celery, client: Any, settings: Settings) -> Iterator[Finding]:
    """Yield whether workers answer and take from trueup's queues, what waits there, and tasks that hang."""
    inspect = app.control.inspect(timeout=ANSWER_SECONDS)
    taken: dict[str, list[dict[str, Any]]] = inspect.active_queues() or {}
    served = {queue["name"] for queues in taken.values() for queue in queues}
    waiting = {queue: read_queue_depth(client, queue) for queue in (AI_QUEUE, RECONCILE_QUEUE)}
    if taken:
        yield ok("workers", f"Workers answer: {', '.join(sorted(taken))}.", workers=sorted(taken))
        yield from _hanging(inspect.active() or {}, settings, time.time())
    else:
        yield error(
            "workers",
            f"No worker answered within {ANSWER_SECONDS:.0f} s.",
            "Start them: `celery -A trueup.worker worker -Q trueup-ai`, and the same with `-Q trueup-reconcile`.",
            workers=[],
        )
    if AI_QUEUE in served and settings.model_provider is None and settings.database_url:
        yield error(
            "workers",
            f"Workers take AI tasks from queue {AI_QUEUE}, and no model provider is set: each of them fails.",
            f"Set {PREFIX}MODEL_PROVIDER for the workers, and restart them.",
            queue=AI_QUEUE,
        )
    for queue, found in waiting.items():
        yield _queue(queue, found, served=queue in served, alone=not taken)


def _queue(queue: str, waiting: QueueDepth, *, served: bool, alone: bool) -> Finding:
    """Return how a queue stands. `alone`: no worker answered at all, which has been said already."""
    detail = {"queue": queue, "served": served, **asdict(waiting)}
    start = f"Start a worker for it: `celery -A trueup.worker worker -Q {queue}`."
    if waiting.length and not served:
        return error("queues", f"In queue {queue} {waiting}, and no worker takes from it.", start, **detail)
    if waiting.length >= LONG_QUEUE or (waiting.oldest_seconds or 0) >= LONG_WAIT_SECONDS:
        return warning(
            "queues", f"In queue {queue} {waiting}.", "Start more workers for it, or see what slows them.", **detail
        )
    if not served and not alone and queue == RECONCILE_QUEUE:
        return warning(
            "queues", f"No worker takes from queue {queue}: nothing is reconciled on schedule.", start, **detail
        )
    return ok("queues", f"In queue {queue} {waiting}.", **detail)


def _hanging(active: dict[str, list[dict[str, Any]]], settings: Settings, now: float) -> Iterator[Finding]:
    """Yield the tasks that run for longer than any may: a worker whose processes hang still answers."""
    limit = settings.task_time_limit_seconds + settings.reconcile_scan_timeout_seconds
    started = [
        (now - float(task["time_start"]), task.get("name"), worker, task.get("id"))
        for worker, tasks in active.items()
        for task in tasks
        if task.get("time_start")
    ]
    if not started:
        return
    seconds, name, worker, task_id = max(started)
    detail = {"task": name, "task_id": task_id, "worker": worker, "seconds": round(seconds)}
    if seconds > limit:
        yield error(
            "tasks",
            f"Task {name} has been running on {worker} for {seconds:.0f} s, longer than any may.",
            "Restart that worker: its tasks are delivered again, and go on with their holds.",
            **detail,
        )
    else:
        yield ok("tasks", f"{len(started)} tasks run, the oldest for {max(seconds, 0):.0f} s.", **detail)
