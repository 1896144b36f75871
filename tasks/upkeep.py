"""The tasks that beat sends: take back the holds of dead workers, forget old answers; and those of reconciling."""

from datetime import timedelta

from celery import shared_task

from billing import db
from billing.charges import prune_answers as prune
from billing.holds import expire_holds as expire_overdue
from billing.settings import get_settings
from tasks.reconcile import reconcile_counters, reconcile_shard, sweep_runs

# A host's application that includes this module has those too.
__all__ = ["expire_holds", "prune_answers", "reconcile_counters", "reconcile_shard", "sweep_runs"]

EXPIRE_LIMIT = 1000
PRUNE_LIMIT = 5000


@shared_task(name="tasks.expire_holds", acks_late=True)
def expire_holds() -> dict[str, int]:
    """Take back overdue holds, a bounded batch; the next call goes on. Returns how many, and their tokens."""
    holds, tokens = db.retrying(lambda connection: expire_overdue(connection, limit=EXPIRE_LIMIT))
    return {"holds": holds, "tokens": tokens}


@shared_task(name="tasks.prune_answers", acks_late=True)
def prune_answers() -> int:
    """Forget stored answers older than the settings' days, a bounded batch; the next call goes on. Returns how many."""
    days = get_settings().answer_retention_days
    return db.retrying(lambda connection: prune(connection, older_than=timedelta(days=days), limit=PRUNE_LIMIT))
