"""The jobs of a reconcile run: their shared context, their source of shards, and the threads that run them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, Engine

from trueup.accounts.user_ids import UserId
from trueup.host.mapping import HostMapping
from trueup.reconcile.audit import Defect
from trueup.reconcile.batch import BatchContext
from trueup.reconcile.runs import Finding, RunKind
from trueup.reconcile.shards import Shard, ShardLostError, claim_shard

Report = Callable[[int, Sequence[Finding], Sequence[Defect]], None]
"""Called after each batch with the number of counters it checked, its findings and its defects."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The context that all shards of a run share.

    `run_id` None: a dry run. `only_user` None: all users of the shard. `batch_size`: users in a batch.
    `scan_timeout_seconds`: time limit of each long read. `stop`: when set, the job ends after its current batch.
    """

    engine: Engine
    context: BatchContext
    run_id: int | None
    kind: RunKind
    only_user: UserId | None
    batch_size: int
    scan_timeout_seconds: int
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


class Shards(Protocol):
    """The source of a run's shards."""

    def take(self) -> Shard | None:
        """Return a shard that no job works on, for this job alone. None: there is none."""


class ShardsInMemory:
    """The shards of a dry run."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.lock = threading.Lock()

    def take(self) -> Shard | None:
        with self.lock:
            return self.shards.pop(0) if self.shards else None


class ShardsOfRun:
    """The shards of a recorded run. A job claims each shard with a lease."""

    def __init__(self, engine: Engine, run_id: int, owner: str) -> None:
        self.engine = engine
        self.run_id = run_id
        self.owner = owner

    def take(self) -> Shard | None:
        with connected(self.engine) as connection:
            return claim_shard(connection, self.run_id, self.owner)


def run_jobs(number: int, shards: Shards, work: Callable[[Shard], object], stop: threading.Event) -> None:
    """Run `work` on each shard, in `number` threads, until no shard is left or `stop` is set.

    Raises the first error of any job; the other jobs end after their current batch. If another process has taken over
    a shard (`ShardLostError`), the job continues with the next shard.
    """

    def take_shards() -> None:
        try:
            while not stop.is_set() and (shard := shards.take()) is not None:
                try:
                    work(shard)
                except ShardLostError:
                    continue
        except BaseException:
            stop.set()
            raise

    if number == 1:
        take_shards()
        return
    with ThreadPoolExecutor(number, thread_name_prefix="reconcile") as pool:
        futures = [pool.submit(take_shards) for _ in range(number)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            # An error or Ctrl-C. Leaving the pool's block waits for the other jobs.
            stop.set()
            raise
