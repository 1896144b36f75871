"""Maintenance tasks that beat sends: expire holds, settle owed charges, deliver charge events, delete old rows."""

from collections.abc import Callable
from datetime import timedelta

from celery import shared_task
from sqlalchemy import Connection

from trueup.database.retry import retrying
from trueup.drift.journal import prune_journal as prune_entries
from trueup.gate.holds import expire_holds as expire_overdue
from trueup.gate.modes import prune_denials
from trueup.gate.owed_charges import settle_owed_charges as settle_charges
from trueup.settings.settings import get_settings
from trueup.tasks.reconcile import reconcile_counters, reconcile_shard, sweep_runs
from trueup.usage.charge_events import deliver_charge_events as deliver_events
from trueup.usage.charges import prune_answers as prune
from trueup.usage.task_requests import prune_requests as prune_old_requests

# A host's application that includes this module gets the reconcile tasks too.
__all__ = [
    "deliver_charge_events",
    "expire_holds",
    "prune_answers",
    "prune_journal",
    "prune_observed_denials",
    "prune_requests",
    "reconcile_counters",
    "reconcile_shard",
    "settle_owed_charges",
    "sweep_runs",
]

EXPIRE_LIMIT = 1000
PRUNE_LIMIT = 5000
# Limit of one task. The next task deletes the rest.
MAX_BATCHES = 50
# Operators read observed denials within weeks.
DENIALS_KEPT = timedelta(days=90)


@shared_task(name="trueup.expire_holds", acks_late=True)
def expire_holds() -> dict[str, int]:
    """Expire at most `EXPIRE_LIMIT` overdue holds; the next task expires the rest. Returns their count and tokens."""
    holds, tokens = retrying(lambda connection: expire_overdue(connection, limit=EXPIRE_LIMIT))
    return {"holds": holds, "tokens": tokens}


@shared_task(name="trueup.settle_owed_charges", acks_late=True)
def settle_owed_charges() -> dict[str, int]:
    """Try again to write the usage rows that the host's log refused. Returns how many it took, and how many not."""
    settled, refused = retrying(settle_charges)
    return {"settled": settled, "refused": refused}


@shared_task(name="trueup.deliver_charge_events", acks_late=True)
def deliver_charge_events() -> dict[str, int]:
    """Call the host's function for charges of which it was not told. Returns how many calls succeeded and failed."""
    delivered, failed = deliver_events()
    return {"delivered": delivered, "failed": failed}


@shared_task(name="trueup.prune_answers", acks_late=True)
def prune_answers() -> int:
    """Remove at most `PRUNE_LIMIT` stored answers older than `answer_retention_days`. Returns their count."""
    days = get_settings().answer_retention_days
    return retrying(lambda connection: prune(connection, older_than=timedelta(days=days), limit=PRUNE_LIMIT))


@shared_task(name="trueup.prune_requests", acks_late=True)
def prune_requests() -> int:
    """Delete HTTP requests whose idempotency key has expired, batch by batch. Returns their count."""
    return _in_batches(lambda connection: prune_old_requests(connection, limit=PRUNE_LIMIT))


@shared_task(name="trueup.prune_observed_denials", acks_late=True)
def prune_observed_denials() -> int:
    """Delete denials older than `DENIALS_KEPT`, batch by batch. Returns their count."""
    return _in_batches(lambda connection: prune_denials(connection, older_than=DENIALS_KEPT, limit=PRUNE_LIMIT))


@shared_task(name="trueup.prune_journal", acks_late=True)
def prune_journal() -> int:
    """Delete settled entries of the counters' journal older than `journal_retention_days`. Returns their count."""
    kept = timedelta(days=get_settings().journal_retention_days)
    return _in_batches(lambda connection: prune_entries(connection, older_than=kept, limit=PRUNE_LIMIT))


def _in_batches(prune_some: Callable[[Connection], int]) -> int:
    pruned = 0
    for _ in range(MAX_BATCHES):
        batch = retrying(prune_some)
        pruned += batch
        if batch < PRUNE_LIMIT:
            break
    return pruned
