"""The task that looks for what an operator must hear of, and sends it."""

import logging

from celery import shared_task

from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.monitoring.alerts import Alert, claim_due, note_failed, note_sent, raise_all
from trueup.settings.settings import get_settings
from trueup.tasks.alert_channels import AlertNotSentError, send

logger = logging.getLogger(__name__)

# The next call goes on: one receiver that is slow must not hold a worker for long.
MAX_SENDINGS = 20


@shared_task(name="trueup.check_alerts", acks_late=True)
def check_alerts() -> dict[str, int]:
    """Raise alerts for runs that have ended and for one that is missing, and send what is due. Returns how many."""
    raised = retrying(raise_all)
    return {"raised": raised, **send_due()}


def send_due() -> dict[str, int]:
    """Send the alerts that are due, one by one, at most `MAX_SENDINGS`. Returns how many were sent, and failed."""
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
    """Send a claimed alert and note how that went. Returns why it failed; None: it was received.

    `retry` False: one that fails is given up at once.

    No connection to the database is held while the receiver takes its time.
    """
    settings = get_settings().alerts
    try:
        send(alert, settings)
    except AlertNotSentError as error:
        reason, final = str(error), error.final or not retry or alert.attempts >= settings.max_attempts
        logger.warning("alert %s by %s was not sent, attempt %s: %s", alert.key, alert.channel, alert.attempts, reason)
        retrying(lambda connection: note_failed(connection, alert, reason, final=final))
        return reason
    retrying(lambda connection: note_sent(connection, alert))
    return None
