"""The tasks that beat sends: take back the holds of dead workers, forget old answers; and those of reconciling."""

from collections.abc import Callable
from datetime import timedelta

from celery import shared_task
from sqlalchemy import Connection

from trueup.database.retry import retrying
from trueup.gate.holds import expire_holds as expire_overdue
from trueup.gate.modes import prune_observed_denials as prune_denials
from trueup.settings.settings import get_settings
from trueup.tasks.reconcile import reconcile_counters, reconcile_shard, sweep_runs
from trueup.usage.charges import prune_answers as prune
from trueup.usage.task_requests import prune_requests as prune_old_requests

# A host's application that includes this module has those too.
__all__ = [
    "expire_holds",
    "prune_answers",
    "prune_observed_denials",
    "prune_requests",
    "reconcile_counters",
    "reconcile_shard",
    "sweep_runs",
]

EXPIRE_LIMIT = 1000
PRUNE_LIMIT = 5000
# Of one call; the next goes on.
MAX_BATCHES = 50
# What was observed is looked at within weeks.
DENIALS_KEPT = timedelta(days=90)


@shared_task(name="trueup.expire_holds", acks_late=True)
def expire_holds() -> dict[str, int]:
    """Take back overdue holds, a bounded batch; the next call goes on. Returns how many, and their tokens."""
    holds, tokens = retrying(lambda connection: expire_overdue(connection, limit=EXPIRE_LIMIT))
    return {"holds": holds, "tokens": tokens}


@shared_task(name="trueup.prune_answers", acks_late=True)
def prune_answers() -> int:
    """Forget stored answers older than the settings' days, a bounded batch; the next call goes on. Returns how many."""
    days = get_settings().answer_retention_days
    return retrying(lambda connection: prune(connection, older_than=timedelta(days=days), limit=PRUNE_LIMIT))


@shared_task(name="trueup.prune_requests", acks_late=True)
def prune_requests() -> int:
    """Forget requests over HTTP that are too old to be repeated, batch by batch. Returns how many."""
    return _in_batches(lambda connection: prune_old_requests(connection, limit=PRUNE_LIMIT))


@shared_task(name="trueup.prune_observed_denials", acks_late=True)
def prune_observed_denials() -> int:
    """Forget what the gate let pass long ago, batch by batch. Returns how many."""
    return _in_batches(lambda connection: prune_denials(connection, older_than=DENIALS_KEPT, limit=PRUNE_LIMIT))


def _in_batches(prune_some: Callable[[Connection], int]) -> int:
    pruned = 0
    for _ in range(MAX_BATCHES):
        batch = retrying(prune_some)
        pruned += batch
        if batch < PRUNE_LIMIT:
            break
    return pruned
