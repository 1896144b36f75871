"""Reconcile: compare every counter with the log's sums, explain each drift, and correct it if its policy allows.

A run is planned as shards, which are ranges of users. A job claims each shard: a thread of this process, or a worker on
another machine. One statement over the whole shard finds the suspects, and batches of a few statements examine them.
A batch writes in single statements. Each is a transaction that the server ends by itself, so that no host row stays
locked while the server waits for this process. A dry run writes nothing.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from trueup.accounts.user_ids import UserId
from trueup.database.driver_errors import reason_of
from trueup.database.engine import translated_errors
from trueup.drift.action import DEFAULT_RULES
from trueup.errors import InvalidInputError
from trueup.gate.owed_charges import settle_owed_charges
from trueup.host.mapping import HostMapping
from trueup.reconcile.audit import Defect, long_read
from trueup.reconcile.batch import BatchContext
from trueup.reconcile.runs import Finding, RunKind, RunSummary, begin_run, end_run, read_summary, refuse_beside_a_run
from trueup.reconcile.shard_worker import Job, connected, work_shard
from trueup.reconcile.shards import (
    Shard,
    ShardLostError,
    claim_shard,
    count_subscriptions,
    kept_alive,
    new_owner,
    shard_ends,
)
from trueup.settings.policies import Rules

SCAN_TIMEOUT_SECONDS = 600
SHARD_SIZE = 250_000
# Several shards for each job, so that the jobs end at about the same time.
SHARDS_PER_JOB = 4
SMALLEST_SHARD = 1000
# How often a run checks whether other processes have finished its last shards.
POLL_SECONDS = 0.5

Progress = Callable[[int, int], None]
"""Called after each batch with the number of counters checked so far and in total (0: not known)."""


def reconcile(
    engine: Engine,
    mapping: HostMapping,
    *,
    kind: RunKind = "quick",
    dry_run: bool = False,
    only_user: UserId | None = None,
    rules: Rules = DEFAULT_RULES,
    batch_size: int = 1000,
    jobs: int = 1,
    scan_timeout_seconds: int = SCAN_TIMEOUT_SECONDS,
    requested_by: str = "",
    keep_findings: bool = False,
    progress: Progress | None = None,
) -> RunSummary:
    """Run one pass. A quick pass compares counters with balances; a deep pass first compares balances with the log.

    If a run of the same kind, rules and users was interrupted recently, this call resumes it; a call interrupted by
    Ctrl-C leaves such a run. `dry_run`: write nothing. `only_user` None: all users. `batch_size`: users in a batch.
    `jobs`: number of threads, each with its own connection; the engine's pool needs one more.
    `scan_timeout_seconds`: time limit of each long read. `requested_by`: stored with the run. `keep_findings`: return
    the findings in the summary; a dry run always does.
    Raises `RunInProgressError` if another run is in progress, `InvalidInputError`, `ServiceUnavailableError` or
    `NotInstalledError`.
    """
    if only_user is not None and kind == "deep":
        raise InvalidInputError("user: a deep pass always checks all users. Leave out the user, or do a quick pass.")
    with translated_errors():
        run = _LocalRun(engine, kind=kind, only_user=only_user, jobs=jobs, keep_findings=keep_findings or dry_run)
        with connected(engine) as connection:
            refuse_beside_a_run(connection)
            context = BatchContext.read(connection, mapping, dry_run=dry_run, rules=rules)
        run.job = Job(
            engine=engine,
            context=context,
            run_id=None,
            kind=kind,
            only_user=only_user,
            batch_size=batch_size,
            scan_timeout_seconds=scan_timeout_seconds,
            report=run.report,
            stop=threading.Event(),
        )
        if progress:
            run.start_progress(progress)
        return run.dry_run() if dry_run else run.work(requested_by)


class _LocalRun:
    """A run that this process started, and its figures so far."""

    job: Job

    def __init__(
        self, engine: Engine, *, kind: RunKind, only_user: UserId | None, jobs: int, keep_findings: bool
    ) -> None:
        self.engine = engine
        self.kind = kind
        self.only_user = only_user
        self.jobs = jobs
        self.keep_findings = keep_findings
        self.owner = new_owner()
        self.progress: Progress | None = None
        self.total = 0
        self.lock = threading.Lock()
        self.summary = RunSummary(run_id=None, dry_run=True, started_at=self._now(), kind=kind)

    def start_progress(self, progress: Progress) -> None:
        """Report progress from now on, against the number of all subscriptions."""
        self.progress, self.total = progress, 1
        if self.only_user is None:
            with self._long_read() as connection:
                self.total = count_subscriptions(connection, self.job.mapping, None, None)

    def report(self, checked: int, findings: Sequence[Finding], defects: Sequence[Defect]) -> None:
        with self.lock:
            self.summary.add(checked, findings)
            self.summary.add_defects(defects)
            if self.keep_findings:
                self.summary.keep(findings)
            if self.progress:
                self.progress(self.summary.checked, max(self.total, self.summary.checked))

    def dry_run(self) -> RunSummary:
        """Do a dry run, with its shards in memory only."""
        size = self._shard_size()
        ends: list[UserId | None] = []
        if size is not None:
            with self._long_read() as connection:
                ends = list(shard_ends(connection, size))
        starts = [None, *ends]
        shards = deque(Shard(after=after, last=last) for after, last in zip(starts, [*ends, None], strict=True))

        def take() -> Shard | None:
            with suppress(IndexError):  # one call, so that two threads never get the same shard
                return shards.popleft()
            return None

        self._do_jobs(take)
        self.summary.finished_at = self._now()
        self.summary.status = "finished"
        return self.summary

    def work(self, requested_by: str) -> RunSummary:
        """Do a run that is recorded in the database."""
        with connected(self.engine) as connection:
            settle_owed_charges(connection)
        size = self._shard_size()
        with self._long_read() as connection:
            begun = begin_run(
                connection,
                kind=self.kind,
                rules=self.job.context.rules,
                owner=self.owner,
                requested_by=requested_by,
                only_user=self.only_user,
                shard_size=size,
            )
        assert begun is not None  # noqa: S101 - begin_run returns None only with a period
        run_id = begun.run_id
        self.job = replace(self.job, run_id=run_id)
        try:
            with connected(self.engine) as connection:
                self.summary.checked = read_summary(connection, run_id).checked
            with kept_alive(self.engine, run_id, self.owner):
                self._to_the_end(run_id)
        except BaseException as error:
            status, reason = ("failed", reason_of(error)) if isinstance(error, Exception) else ("interrupted", None)
            # If this write fails too, the run's lease expires, and the next call resumes the run.
            with suppress(DBAPIError), connected(self.engine) as connection:
                end_run(connection, run_id, status=status, error=reason, owner=self.owner)
            raise
        with connected(self.engine) as connection:
            ended = read_summary(connection, run_id)
        ended.resumed = begun.resumed
        ended.findings = self.summary.findings
        return ended

    def _to_the_end(self, run_id: int) -> None:
        """Work until no shard is left. Wait for shards of other processes too, because their owners may die."""

        def take() -> Shard | None:
            with connected(self.engine) as connection:
                return claim_shard(connection, run_id, self.owner)

        while True:
            self._do_jobs(take)
            with connected(self.engine) as connection:
                if end_run(connection, run_id):
                    return
                status = read_summary(connection, run_id).status
            if status != "running":
                return
            time.sleep(POLL_SECONDS)

    def _do_jobs(self, take: Callable[[], Shard | None]) -> None:
        """Work on the shards that `take` returns, in `self.jobs` threads, until it returns None or the job stops.

        Raises the first error of any thread; the others end after their current batch. If another process has taken
        over a shard (`ShardLostError`), the thread continues with the next shard.
        """
        stop = self.job.stop

        def take_shards() -> None:
            try:
                while not stop.is_set() and (shard := take()) is not None:
                    with suppress(ShardLostError):
                        work_shard(self.job, shard)
            except BaseException:
                stop.set()
                raise

        if self.jobs == 1:
            take_shards()
            return
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="reconcile") as pool:
            futures = [pool.submit(take_shards) for _ in range(self.jobs)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                # An error or Ctrl-C. Leaving the pool's block waits for the other threads.
                stop.set()
                raise

    def _shard_size(self) -> int | None:
        """Return the number of subscriptions in a shard. None: one shard for all."""
        if self.only_user is not None:
            return None
        total = self.total
        if not total:
            with self._long_read() as connection:
                total = count_subscriptions(connection, self.job.mapping, None, None)
        if self.jobs == 1:
            return SHARD_SIZE * SHARDS_PER_JOB if total > SHARD_SIZE * SHARDS_PER_JOB else None
        return max(SMALLEST_SHARD, min(SHARD_SIZE, -(-total // (self.jobs * SHARDS_PER_JOB))))

    def _long_read(self) -> AbstractContextManager[Connection]:
        return long_read(self.engine, self.job.scan_timeout_seconds)

    def _now(self) -> datetime:
        with connected(self.engine) as connection:
            now = connection.scalar(text("SELECT clock_timestamp()"))
        assert isinstance(now, datetime)  # noqa: S101 - for the type checker: a query of one value
        return now
