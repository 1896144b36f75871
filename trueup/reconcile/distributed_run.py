"""Reconcile runs shared by many workers: one plans the run, all take its shards, a sweeper finds abandoned shards."""

import threading
from dataclasses import dataclass

from sqlalchemy import Engine, text

from trueup.database.engine import translated_errors
from trueup.gate.owed_charges import settle_owed_charges
from trueup.host.mapping import HostMapping
from trueup.reconcile.audit import long_read
from trueup.reconcile.batch import BatchContext
from trueup.reconcile.local_run import SCAN_TIMEOUT_SECONDS
from trueup.reconcile.runs import RunKind, RunSummary, begin_run, end_run, read_summary, runs_by, sweep_runs
from trueup.reconcile.shard_worker import Job, connected, work_shard
from trueup.reconcile.shards import ShardLostError, claim_shard, kept_alive, new_owner
from trueup.settings.policies import Rules

SWEEP_LEASE_SECONDS = 180
"""The lease that the sweeper gives to a run. Until it ends, no other process may take over the run."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run, and the numbers of its unclaimed shards."""

    run_id: int
    shards: list[int]


@dataclass(frozen=True, kw_only=True)
class ShardOutcome:
    """The result of a call that works on a shard. `taken`: the call claimed it. `left`: the shard is not finished.

    `ended`: the run's figures, if this call ended the run; None: it did not.
    """

    taken: bool = False
    left: bool = False
    ended: RunSummary | None = None


def plan_run(
    engine: Engine,
    *,
    kind: RunKind,
    rules: Rules,
    shard_size: int,
    requested_by: str,
    every_seconds: int | None = None,
    offset_seconds: int = 0,
    scan_timeout_seconds: int = SCAN_TIMEOUT_SECONDS,
) -> PlannedRun | None:
    """Begin a run, or resume an interrupted one, for other workers. Returns None if this period has had its run.

    `shard_size`: subscriptions in a shard. `every_seconds`: length of the run's period, counted from `offset_seconds`
    after midnight UTC; None: the run belongs to no period. `scan_timeout_seconds`: time limit for planning the shards.
    Raises `RunInProgressError`, `ServiceUnavailableError` or `NotInstalledError`.
    """
    with translated_errors(), long_read(engine, scan_timeout_seconds) as connection:
        begun = begin_run(
            connection,
            kind=kind,
            rules=rules,
            owner=new_owner(),
            requested_by=requested_by,
            shard_size=shard_size,
            every_seconds=every_seconds,
            offset_seconds=offset_seconds,
        )
    if begun is None:
        return None
    with translated_errors(), connected(engine) as connection:
        settle_owed_charges(connection)
        numbers = connection.scalars(
            text(
                "SELECT number FROM trueup.reconcile_shard "
                "WHERE run_id = :run_id AND (status = 'waiting' OR lease_until <= clock_timestamp()) ORDER BY number"
            ),
            {"run_id": begun.run_id},
        )
        return PlannedRun(run_id=begun.run_id, shards=list(numbers))


def work_on_shard(
    engine: Engine,
    mapping: HostMapping,
    *,
    run_id: int,
    number: int,
    rules: Rules,
    batch_size: int,
    seconds: float,
    scan_timeout_seconds: int = SCAN_TIMEOUT_SECONDS,
) -> ShardOutcome:
    """Work on a shard for about `seconds`, unless another worker has it. End the run if no shard is left.

    `number`: the shard's number in the run. `rules`: if the run was planned under other rules, nothing is done.
    Raises `ServiceUnavailableError` or `NotInstalledError`; then another attempt can claim the shard.
    """
    owner = new_owner()
    with translated_errors():
        with connected(engine) as connection:
            if not runs_by(connection, run_id, rules):
                return ShardOutcome()
            shard = claim_shard(connection, run_id, owner, number=number)
            if shard is None:
                return _ended(engine, run_id, ShardOutcome())
            context = BatchContext.read(connection, mapping, dry_run=False, rules=rules)
            kind = read_summary(connection, run_id).kind
        stop = threading.Event()
        job = Job(
            engine=engine,
            context=context,
            run_id=run_id,
            kind=kind,
            only_user=None,
            batch_size=batch_size,
            scan_timeout_seconds=scan_timeout_seconds,
            report=lambda *_figures: None,
            stop=stop,
        )
        timer = threading.Timer(seconds, stop.set)
        timer.daemon = True
        timer.start()
        try:
            with kept_alive(engine, run_id, owner):
                finished = work_shard(job, shard)
        except ShardLostError:
            return ShardOutcome(taken=True)
        finally:
            timer.cancel()
        return _ended(engine, run_id, ShardOutcome(taken=True, left=not finished))


def _ended(engine: Engine, run_id: int, outcome: ShardOutcome) -> ShardOutcome:
    with connected(engine) as connection:
        if outcome.left or not end_run(connection, run_id):
            return outcome
        return ShardOutcome(taken=outcome.taken, ended=read_summary(connection, run_id))


def sweep(engine: Engine, rules: Rules) -> list[tuple[int, int]]:
    """End finished runs, and return the abandoned shards as (run, number); the caller sends their messages again."""
    with translated_errors(), connected(engine) as connection:
        return sweep_runs(connection, rules, lease_seconds=SWEEP_LEASE_SECONDS)
