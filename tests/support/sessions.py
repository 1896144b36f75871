"""Concurrent sessions: threads with their own connections, and waits for the states that PostgreSQL reports."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, text

from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for

Result = TypeVar("Result")


@contextmanager
def in_background() -> Iterator[Callable[..., "Future[Any]"]]:
    """Give `submit`, which runs a function in a thread and returns its future."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def run_at_once(functions: list[Callable[[], Result]]) -> list[Result]:
    """Start the functions at the same time in threads. Returns their results in order, and raises their errors."""
    start = threading.Barrier(len(functions), timeout=DEADLINE_SECONDS)

    def run(function: Callable[[], Result]) -> Result:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(run, function) for function in functions]
        return [future.result() for future in futures]


def backend_pid(connection: Connection) -> int:
    pid: int = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    return pid


def wait_for_lock(host: Host, pid: int | None = None) -> None:
    """Return when that session, or any session of this database, waits for a lock."""
    wait_for(
        lambda: host.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND wait_event_type = 'Lock' AND (CAST(:pid AS int) IS NULL OR pid = :pid)",
            pid=pid,
        ),
        "a session to wait for a lock",
    )


@contextmanager
def locked(host: Host, statement: str, **values: Any) -> Iterator[Connection]:
    """Hold the locks of a statement in an open transaction of another session, which is rolled back at the end."""
    with host.engine.connect() as connection:
        connection.execute(text(statement), values)
        yield connection
        connection.rollback()


@contextmanager
def locked_balance(host: Host, user: Any) -> Iterator[Connection]:
    """Hold a user's balance, as a gate in the middle of its work does."""
    with locked(host, "SELECT * FROM trueup.balance WHERE user_id = :user FOR UPDATE", user=user) as connection:
        yield connection


@contextmanager
def impatient(host: Host) -> Iterator[Connection]:
    """Give a host session that fails at once instead of waiting for a lock."""
    with host.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET lock_timeout = '100ms'; SET statement_timeout = '5s'"))
        yield connection
