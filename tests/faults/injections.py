"""The faults. Each kind is a function that strikes now, and returns False if it found nothing to strike."""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psutil
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.faults.kinds import HOLD_TTL_SECONDS, VISIBILITY_SECONDS
from tests.faults.ledger import GraphLedger, Ledger
from tests.faults.plans import Fault
from tests.faults.workers import Worker
from trueup.gate.holds import expire_holds
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.stack.waiting import wait_until

if TYPE_CHECKING:
    from tests.faults.stages import Stage

Injection = Callable[["Stage", Fault], bool]

_MOMENT_SECONDS = 0.5  # how long to wait for the right moment


def past_every_hold() -> datetime:
    """Return a time at which nothing of this round is held any more, with the calls in flight."""
    return datetime.now(UTC) + timedelta(hours=1)


def _child_killed(stage: "Stage", fault: Fault) -> bool:
    worker, child = _pick_child(stage, fault)
    if worker is None or child is None:
        return False
    worker.kill_child(child)
    return True


def _child_killed_in_call(stage: "Stage", fault: Fault) -> bool:
    """Kill a process that waits for the provider. The cost of that call is never known."""
    worker, child = _caller(stage, stage.provider.ledger)
    if worker is None or child is None:
        return False
    worker.kill_child(child)
    return True


def _child_killed_after_charge(stage: "Stage", fault: Fault) -> bool:
    owner = _wait_for_charge(stage)
    for worker in stage.workers:
        for child in worker.children():
            if child.pid == owner:
                worker.kill_child(child)
                return True
    return False


def _child_killed_while_sending(stage: "Stage", fault: Fault) -> bool:
    """Kill a process that waits for Instagram. It is never known whether that message was sent."""
    worker, child = _caller(stage, stage.graph.ledger)
    if worker is None or child is None:
        return False
    worker.kill_child(child)
    return True


def _worker_killed(stage: "Stage", fault: Fault) -> bool:
    worker = _pick_worker(stage, fault)
    if worker is None:
        return False
    worker.kill()
    stage.later(0.2, worker.revive)
    return True


def _worker_killed_after_charge(stage: "Stage", fault: Fault) -> bool:
    return _wait_for_charge(stage) is not None and _worker_killed(stage, fault)


def _child_stopped(stage: "Stage", fault: Fault) -> bool:
    _, child = _pick_child(stage, fault)
    return child is not None and _stop(stage, child, fault.seconds)


def _child_stopped_past_lease(stage: "Stage", fault: Fault) -> bool:
    """Stop a process in the middle of a call until its task is delivered again and its lease has ended."""
    _, child = _caller(stage, stage.provider.ledger)
    return child is not None and _stop(stage, child, VISIBILITY_SECONDS + 1 + fault.seconds / 3)


def _child_stopped_while_sending(stage: "Stage", fault: Fault) -> bool:
    """Stop a process that waits for Instagram until its task is delivered again."""
    _, child = _caller(stage, stage.graph.ledger)
    return child is not None and _stop(stage, child, VISIBILITY_SECONDS + 1 + fault.seconds / 3)


def _child_stopped_past_hold(stage: "Stage", fault: Fault) -> bool:
    """Stop a process in the middle of a call, and let its hold expire by the clock given to the sweep.

    It lasts for one hold's time, not two: a call's maximum cost is kept for that long, and Celery's time limit lets
    no process stand still for longer.
    """
    _, child = _caller(stage, stage.provider.ledger)
    if child is None or not _stop(stage, child, fault.seconds):
        return False
    with suppress(DBAPIError), stage.engine.begin() as connection:
        expire_holds(connection, now=datetime.now(UTC) + timedelta(seconds=HOLD_TTL_SECONDS + 1))
    return True


def _worker_stopped(stage: "Stage", fault: Fault) -> bool:
    worker = _pick_worker(stage, fault)
    if worker is None:
        return False
    stage.stopped.update(child.pid for child in worker.children())
    worker.signal(signal.SIGSTOP)
    stage.later(fault.seconds, lambda: worker.signal(signal.SIGCONT))
    return True


def _redis_restarted(stage: "Stage", fault: Fault) -> bool:
    stage.servers.restart_redis(signal.SIGTERM, fault.seconds / 2)
    return True


def _redis_killed(stage: "Stage", fault: Fault) -> bool:
    stage.servers.restart_redis(signal.SIGKILL, fault.seconds / 2)
    return True


def _redis_flushed(stage: "Stage", fault: Fault) -> bool:
    stage.servers.flush_redis()
    stage.flushed = True
    return True


def _redis_connections_cut(stage: "Stage", fault: Fault) -> bool:
    return stage.servers.cut_redis() > 0


def _postgres_restarted(stage: "Stage", fault: Fault) -> bool:
    stage.servers.restart_postgres()
    return True


def _database_sessions_cut(stage: "Stage", fault: Fault) -> bool:
    return stage.servers.cut_sessions(stage.database) > 0


def _database_sessions_cut_after_charge(stage: "Stage", fault: Fault) -> bool:
    return _wait_for_charge(stage) is not None and stage.servers.cut_sessions(stage.database) > 0


def _database_sessions_cut_while_sending(stage: "Stage", fault: Fault) -> bool:
    return _caller(stage, stage.graph.ledger)[1] is not None and stage.servers.cut_sessions(stage.database) > 0


def _functions_replaced(stage: "Stage", fault: Fault) -> bool:
    """Set the database up again while the workers work, as `trueup db init` of a release does."""
    try:
        with stage.engine.begin() as connection:
            install(connection, HostMapping(), with_host_tables=True)
    except DBAPIError:
        return False
    return True


INJECTIONS: dict[str, Injection] = {
    "child_killed": _child_killed,
    "child_killed_in_call": _child_killed_in_call,
    "child_killed_after_charge": _child_killed_after_charge,
    "child_killed_while_sending": _child_killed_while_sending,
    "worker_killed": _worker_killed,
    "worker_killed_after_charge": _worker_killed_after_charge,
    "child_stopped": _child_stopped,
    "child_stopped_past_lease": _child_stopped_past_lease,
    "child_stopped_past_hold": _child_stopped_past_hold,
    "child_stopped_while_sending": _child_stopped_while_sending,
    "worker_stopped": _worker_stopped,
    "redis_restarted": _redis_restarted,
    "redis_killed": _redis_killed,
    "redis_flushed": _redis_flushed,
    "redis_connections_cut": _redis_connections_cut,
    "postgres_restarted": _postgres_restarted,
    "database_sessions_cut": _database_sessions_cut,
    "database_sessions_cut_after_charge": _database_sessions_cut_after_charge,
    "database_sessions_cut_while_sending": _database_sessions_cut_while_sending,
    "functions_replaced": _functions_replaced,
}


def _at_work(stage: "Stage") -> list[Worker]:
    """Return the workers that take tasks. A worker that boots has nothing to lose."""
    return [worker for worker in stage.workers if worker.at_work]


def _pick_worker(stage: "Stage", fault: Fault) -> Worker | None:
    found = _at_work(stage)
    return found[fault.target % len(found)] if found else None


def _pick_child(stage: "Stage", fault: Fault) -> tuple[Worker | None, psutil.Process | None]:
    children = [(worker, child) for worker in _at_work(stage) for child in worker.children()]
    return children[fault.target % len(children)] if children else (None, None)


def _caller(stage: "Stage", ledger: Ledger | GraphLedger) -> tuple[Worker | None, psutil.Process | None]:
    """Wait for a request to the server of that ledger, and return the process that waits for its answer."""
    found: list[tuple[Worker, psutil.Process]] = []

    def waiting() -> bool:
        pids = {request.pid for request in ledger.in_flight()}
        found.extend((w, child) for w in _at_work(stage) for child in w.children() if child.pid in pids)
        return bool(found)

    wait_until(waiting, _MOMENT_SECONDS)
    return found[0] if found else (None, None)


def _wait_for_charge(stage: "Stage") -> int | None:
    """Return when a charge is committed, with the pid of the process that made the call. None: none came in time."""
    latest = text("SELECT charged_at, model_name FROM trueup.charge ORDER BY charged_at DESC LIMIT 1")
    end = time.monotonic() + _MOMENT_SECONDS
    try:
        with stage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            before = connection.execute(latest).one_or_none()
            while time.monotonic() < end:
                row = connection.execute(latest).one_or_none()
                if row is not None and row != before:
                    pids = {serving.model_name: serving.pid for serving in stage.provider.ledger.servings()}
                    return pids.get(row.model_name)
                time.sleep(0.002)
    except DBAPIError:
        return None
    return None


def _stop(stage: "Stage", child: psutil.Process, seconds: float) -> bool:
    def resume() -> None:
        with suppress(psutil.NoSuchProcess):
            child.resume()

    try:
        child.suspend()
    except psutil.NoSuchProcess:
        return False
    stage.stopped.add(child.pid)
    stage.later(seconds, resume)
    return True
