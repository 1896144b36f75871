"""The tasks that beat sends: reconcile the counters, take back the holds of dead workers. Neither spends tokens."""

from datetime import timedelta
from typing import Any

from celery import shared_task

from billing import db
from billing.charges import prune_answers as prune
from billing.errors import ServiceUnavailableError
from billing.holds import expire_holds as expire_overdue
from billing.reconcile import reconcile
from billing.reconcile_runs import RunInProgressError
from billing.settings import get_settings

EXPIRE_LIMIT = 1000
PRUNE_LIMIT = 5000


@shared_task(
    name="tasks.reconcile_counters",
    acks_late=True,
    autoretry_for=(ServiceUnavailableError,),
    retry_backoff=True,
    max_retries=5,
)
def reconcile_counters() -> dict[str, Any]:
    """Run one quick pass over all counters. Returns its figures, or which run was already at work."""
    settings = get_settings()
    try:
        with db.translated_errors():
            summary = reconcile(db.get_engine(), settings.host, batch_size=settings.reconcile_batch_size)
    except RunInProgressError:
        return {"skipped": "another run is in progress"}
    return {
        "run_id": summary.run_id,
        "checked": summary.checked,
        "drifted": summary.drifted,
        "corrected": summary.corrected,
        "tokens_overstated": summary.tokens_overstated,
        "tokens_understated": summary.tokens_understated,
    }


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
