"""The task that checks for conditions an operator must know, and sends alerts about them."""

import logging

from celery import shared_task

from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.monitoring.alerts import Alert, claim_due, note_failed, note_sent, raise_all
from trueup.settings.settings import get_settings
from trueup.tasks.alert_channels import AlertNotSentError, send

logger = logging.getLogger(__name__)

# Limit of one task, so that a slow receiver does not block a worker for long. The next task sends the rest.
MAX_SENDINGS = 20


@shared_task(name="trueup.check_alerts", acks_late=True)
def check_alerts() -> dict[str, int]:
    """Raise alerts for ended runs and for a missing run, then send the due alerts. Returns the counts."""
    raised = retrying(raise_all)
    return {"raised": raised, **send_due()}


def send_due() -> dict[str, int]:
    """Send at most `MAX_SENDINGS` due alerts, one by one. Returns the counts of sent and failed ones."""
    sent = failed = 0
    while sent + failed < MAX_SENDINGS:
        with connect() as connection:
            claimed = claim_due(connection)
        if not claimed:
            break
        if deliver(claimed[0]) is None:
            sent += 1
        else:
            failed += 1
    return {"sent": sent, "failed": failed}


def deliver(alert: Alert, *, retry: bool = True) -> str | None:
    """Send a claimed alert and record the outcome. Returns the reason of a failure; None: the receiver accepted it.

    `retry` False: a failed alert is not sent again.

    It keeps no database connection while it waits for the receiver.
    """
    settings = get_settings().alerts
    try:
        send(alert, settings)
    except AlertNotSentError as error:
        reason, final = str(error), error.final or not retry or alert.attempts >= settings.max_attempts
        logger.warning(
            "alert not sent key=%s channel=%s attempt=%s error=%s", alert.key, alert.channel, alert.attempts, reason
        )
        retrying(lambda connection: note_failed(connection, alert, reason, final=final))
        return reason
    retrying(lambda connection: note_sent(connection, alert))
    return None
