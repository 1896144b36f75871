"""Checks of I1 and I4 while a round plays, at every commit that can be seen."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from tests.support.books import assert_true
from tests.support.host import Host

_PERIOD_SECONDS = 0.15


@dataclass(kw_only=True)
class Audit:
    """The number of checks, and the mismatches that they found."""

    looks: int = 0
    findings: list[str] = field(default_factory=list)


@contextmanager
def auditing(engine: Engine, audit: Audit) -> Iterator[None]:
    """Check the books again and again in a thread. The database may stop and start meanwhile."""
    stop = threading.Event()
    thread = threading.Thread(target=_look, args=(engine, audit, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _look(engine: Engine, audit: Audit, stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(DBAPIError), Host(engine) as host:
            while not stop.wait(_PERIOD_SECONDS):
                try:
                    assert_true(host)
                except AssertionError as error:
                    audit.findings.append(str(error))
                audit.looks += 1
        stop.wait(_PERIOD_SECONDS)
