"""Reconciling by workers: a run is planned once a period, its shards are worked on by whoever takes their messages.

Progress is in the database. A message that is lost is sent again by the sweeper; one that comes twice finds nothing to
do.
"""

from typing import Any

from celery import current_task, shared_task

from trueup.database.engine import get_engine
from trueup.errors import ServiceUnavailableError
from trueup.reconcile.distributed_run import ShardOutcome, plan_run, sweep, work_on_shard
from trueup.reconcile.runs import RunInProgressError, RunSummary
from trueup.settings.settings import get_settings

SWEEP_INTERVAL_SECONDS = 60
# Of the task's hard time limit: then a shard is put back, for the next message to go on with.
WORKED_SHARE = 0.8

_RETRIED: dict[str, Any] = {
    "acks_late": True,
    "autoretry_for": (ServiceUnavailableError,),
    "retry_backoff": True,
    "max_retries": 5,
}


@shared_task(name="trueup.reconcile_counters", **_RETRIED)
def reconcile_counters(scheduled: bool = False, deep: bool = False) -> dict[str, Any]:
    """Plan a pass over all counters, and begin it. Returns its figures if it is over, or why there is none.

    `scheduled`: only if this period has had none. `deep`: the balances are compared with the log first.
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
    # The first one here: a small host's run is over with this task.
    outcome = _work(run.run_id, first)
    if outcome.ended:
        return _figures(outcome.ended)
    return {"run_id": run.run_id, "shards": len(run.shards)}


@shared_task(name="trueup.reconcile_shard", **_RETRIED)
def reconcile_shard(run_id: int, number: int) -> dict[str, Any]:
    """Work on a shard of a run, for as long as a task may take; the next message goes on. Returns what became of it."""
    outcome = _work(run_id, number)
    if outcome.ended:
        return _figures(outcome.ended)
    if not outcome.taken:
        return {"skipped": "nothing is left of this shard, or another works on it"}
    return {"run_id": run_id, "shard": number, "left": outcome.left}


@shared_task(name="trueup.sweep_runs", acks_late=True)
def sweep_runs() -> dict[str, int]:
    """End runs whose shards are done, and send those again that nobody works on. Returns how many were sent."""
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
    """Send a shard's message to the queue that the current task came by.

    It expires when the sweeper has sent another, so that none pile up.
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
