"""Jobs that share the shards of a run: threads of this process, or, where much is found, processes of their own."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from sqlalchemy import Engine

from trueup.reconcile.shard_processes import ProcessEndedError, ShardProcess
from trueup.reconcile.shard_worker import work_shard
from trueup.reconcile.shards import Shard, ShardLostError, claim_shard, end_shard, reload_shard
from trueup.reconcile.work import Job, connected

logger = logging.getLogger(__name__)


class Shards(Protocol):
    """Where jobs take shards from."""

    def take(self) -> Shard | None:
        """Return a shard that nobody works on; None: there is none."""

    def put_back(self, shard: Shard, ended: ProcessEndedError | None = None) -> None:
        """Leave a shard that is not finished to any job. `ended`: who died over it; None: it was let go of."""


class ShardsInMemory:
    """Those of a dry run."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.lock = threading.Lock()

    def take(self) -> Shard | None:
        with self.lock:
            return self.shards.pop(0) if self.shards else None

    def put_back(self, shard: Shard, ended: ProcessEndedError | None = None) -> None:
        """Raises the error of a process that died: what it had found of the shard, nobody knows."""
        if ended and ended.exit_code:
            raise ended
        with self.lock:
            self.shards.insert(0, shard)


class ShardsOfRun:
    """Those of a run that is written down."""

    def __init__(self, engine: Engine, run_id: int, owner: str) -> None:
        self.engine = engine
        self.run_id = run_id
        self.owner = owner

    def take(self) -> Shard | None:
        with connected(self.engine) as connection:
            return claim_shard(connection, self.run_id, self.owner)

    def put_back(self, shard: Shard, ended: ProcessEndedError | None = None) -> None:
        if ended is None:
            return  # whoever let go of it has written that down
        logger.warning("A process ended (%d); its shard of run %d is gone on with.", ended.exit_code, self.run_id)
        with suppress(ShardLostError), connected(self.engine) as connection:
            reload_shard(connection, shard)
            end_shard(connection, shard, finished=False, error=str(ended) if ended.exit_code else None)


class Jobs:
    """So many jobs that work until no shard is left.

    `pays`: set as soon as it pays to work in processes. `start_process`: how one is started; None: jobs stay threads.
    """

    def __init__(
        self,
        job: Job,
        shards: Shards,
        *,
        number: int,
        pays: threading.Event,
        start_process: Callable[[], ShardProcess] | None,
    ) -> None:
        self.job = job
        self.shards = shards
        self.number = number
        self.pays = pays
        self.start_process = start_process

    def run(self) -> None:
        """Raises the first job's error that comes, when the others have ended their batches."""
        if self.number == 1:
            self._take_shards()
            return
        with ThreadPoolExecutor(self.number, thread_name_prefix="reconcile") as pool:
            # One always works here: this process has nothing better to do.
            may_move = self.start_process is not None
            futures = [pool.submit(self._take_shards, may_move=may_move and place > 0) for place in range(self.number)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                # An error or Ctrl-C; the pool waits for the others.
                self.job.stop.set()
                raise

    def _take_shards(self, *, may_move: bool = False) -> None:
        """Work on shards until none is left; `may_move`: in a process of its own, as soon as that pays."""
        here = partial(work_shard, self.job)
        until_it_pays = partial(work_shard, replace(self.job, stop=_Either(self.job.stop, self.pays)))
        work: Callable[[Shard], bool] = until_it_pays if may_move else here
        with ExitStack() as processes:
            try:
                while not self.job.stop.is_set() and (shard := self.shards.take()) is not None:
                    if may_move and self.pays.is_set():
                        may_move, work = False, self._moved(processes) or here
                    try:
                        if not work(shard):
                            self.shards.put_back(shard)
                    except ShardLostError:
                        continue
                    except ProcessEndedError as ended:
                        work = here
                        self.shards.put_back(shard, ended)
            except BaseException:
                self.job.stop.set()
                raise

    def _moved(self, processes: ExitStack) -> Callable[[Shard], bool] | None:
        """Start a process, which ends with these. Returns how it is made to work; None if there can't be one."""
        assert self.start_process is not None  # noqa: S101 - else nothing may move
        try:
            process = self.start_process()
        except OSError as error:
            logger.warning("No process could be started (%s); its work is done in this one.", error)
            return None
        processes.callback(process.close)
        return partial(process.work, stop=self.job.stop)


class _Either(threading.Event):
    """Asks a thread to end its batch: to stop, or to make room for a process."""

    def __init__(self, stop: threading.Event, pays: threading.Event) -> None:
        super().__init__()
        self.stop = stop
        self.pays = pays

    def is_set(self) -> bool:
        return self.stop.is_set() or self.pays.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait before another try: a process would have to wait as well."""
        return self.stop.wait(timeout)
