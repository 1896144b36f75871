"""What there is to do in a reconcile run, and where it is done."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Engine

from trueup.accounts.user_ids import UserId
from trueup.host.mapping import HostMapping
from trueup.reconcile.audit import Defect
from trueup.reconcile.batch import BatchContext
from trueup.reconcile.runs import Finding, RunKind

Report = Callable[[int, Sequence[Finding], Sequence[Defect]], None]
"""Called after each batch with how many counters it checked, and what it found."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all shards of a run share. `run_id` None: a dry run. `only_user` None: all users of the shard."""

    context: BatchContext
    run_id: int | None
    kind: RunKind
    only_user: UserId | None
    batch_size: int
    scan_timeout_seconds: int

    def plain(self) -> dict[str, Any]:
        """Return these fields alone, without what a subclass adds."""
        return {field.name: getattr(self, field.name) for field in fields(Work)}


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """That work where it is done. `stop`: set when it is to end at the next batch."""

    engine: Engine
    report: Report
    stop: threading.Event

    @property
    def mapping(self) -> HostMapping:
        return self.context.mapping


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Give a connection on which each statement is its own transaction."""
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")
