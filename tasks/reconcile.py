"""Distributed reconciliation: one task plans a run per period, and any worker may process its shards.

Progress is kept in the database. The sweeper sends a lost message again; a duplicate message finds nothing to do.
"""

from typing import Any

from celery import current_task, shared_task

from trueup.database.engine import get_engine
from trueup.errors import ServiceUnavailableError
from trueup.reconcile.distributed_run import ShardOutcome, plan_run, sweep, work_on_shard
from trueup.reconcile.runs import RunInProgressError, RunSummary
from trueup.settings.settings import get_settings

SWEEP_INTERVAL_SECONDS = 60
# Share of the task's hard time limit after which a task stops and sends a message for the rest of its shard.
WORKED_SHARE = 0.8

_RETRIED: dict[str, Any] = {
    "acks_late": True,
    "autoretry_for": (ServiceUnavailableError,),
    "retry_backoff": True,
    "max_retries": 5,
}


@shared_task(name="trueup.reconcile_counters", **_RETRIED)
def reconcile_counters(scheduled: bool = False, deep: bool = False) -> dict[str, Any]:
    """Plan a run over all counters and start it.

    `scheduled` True: only if no run was planned in this period. `deep` True: compare the balances with the usage log
    first. Returns the run's figures if it has ended, its id and count of shards if it still runs, or why there is none.
    """
    settings = get_settings()
    every = settings.reconcile_deep_interval_seconds if deep else settings.reconcile_interval_seconds
    try:
        run = plan_run(
            get_engine(),
            kind="deep" if deep else "quick",
            rules=settings.reconcile.rules(),
            shard_size=settings.reconcile_shard_size,
            requested_by="schedule" if scheduled else "task",
            every_seconds=every if scheduled else None,
            offset_seconds=settings.reconcile_deep_offset_seconds if deep else 0,
            scan_timeout_seconds=settings.reconcile_scan_timeout_seconds,
        )
    except RunInProgressError:
        return {"skipped": "another run is in progress"}
    if run is None:
        return {"skipped": "this period has had its run"}
    first, *others = run.shards or [1]
    for number in others:
        _send(run.run_id, number)
    # Process the first shard here, so that a small host's run ends with this task.
    outcome = _work(run.run_id, first)
    if outcome.ended:
        return _figures(outcome.ended)
    return {"run_id": run.run_id, "shards": len(run.shards)}


@shared_task(name="trueup.reconcile_shard", **_RETRIED)
def reconcile_shard(run_id: int, number: int) -> dict[str, Any]:
    """Process a shard until it is done or the time is up; then a new message continues it. Returns the outcome."""
    outcome = _work(run_id, number)
    if outcome.ended:
        return _figures(outcome.ended)
    if not outcome.taken:
        return {"skipped": "this shard is done, or another worker processes it"}
    return {"run_id": run_id, "shard": number, "left": outcome.left}


@shared_task(name="trueup.sweep_runs", acks_late=True)
def sweep_runs() -> dict[str, int]:
    """End runs whose shards are all done, and send messages for shards that no worker holds. Returns their count."""
    left = sweep(get_engine(), get_settings().reconcile.rules())
    for run_id, number in left:
        _send(run_id, number)
    return {"shards": len(left)}


def _work(run_id: int, number: int) -> ShardOutcome:
    settings = get_settings()
    outcome = work_on_shard(
        get_engine(),
        settings.host,
        run_id=run_id,
        number=number,
        rules=settings.reconcile.rules(),
        batch_size=settings.reconcile_batch_size,
        scan_timeout_seconds=settings.reconcile_scan_timeout_seconds,
        seconds=settings.task_time_limit_seconds * WORKED_SHARE,
    )
    if outcome.left:
        _send(run_id, number)
    return outcome


def _send(run_id: int, number: int) -> None:
    """Send a shard's message to the queue of the current task.

    The message expires by the time the sweeper has sent another, so that messages do not pile up.
    """
    delivery: dict[str, Any] = current_task.request.delivery_info or {}
    reconcile_shard.apply_async(
        kwargs={"run_id": run_id, "number": number},
        queue=delivery.get("routing_key"),
        expires=2 * SWEEP_INTERVAL_SECONDS,
    )


def _figures(summary: RunSummary) -> dict[str, Any]:
    names = ("run_id", "status", "checked", "drifted", "corrected", "found_new", "in_review", "defects")
    return {name: getattr(summary, name) for name in (*names, "tokens_overstated", "tokens_understated")}
