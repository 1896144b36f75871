"""Requeue a task that can't run now, with a countdown."""

import logging
import random
import time
from typing import Any

from celery import Task
from celery.exceptions import Reject, Retry

from trueup.errors import HoldOvertakenError, TrueupError
from trueup.settings.settings import get_settings
from trueup.tasks.republish import WAITS_HEADER, broker_errors

logger = logging.getLogger(__name__)

PROVIDER_RETRY_BASE_SECONDS = 2
# A rejected message comes back at once. While the broker accepts no other message, the task pauses before it rejects.
REJECT_PAUSE_SECONDS = 5.0


def requeue(task: Task, error: TrueupError, seconds: float | None = None, *, waits: int | None = None) -> Exception:
    """Requeue the running task with a countdown, and return the exception that the caller must raise.

    `seconds`: the countdown; None: exponential backoff up to `gate_retry_max_seconds`. `waits`: the count of waits that
    the new message carries; None: one more than this message's.

    The count of waits has no limit: a task that can't be metered must neither run nor be lost.
    """
    request = task.request
    if request.called_directly or request.is_eager:
        return error
    headers, waited = request.headers or {}, waits_of(task)
    countdown = seconds
    if countdown is None:
        longest = min(2.0 ** min(waited, 16), get_settings().gate_retry_max_seconds)
        countdown = longest * random.uniform(0.5, 1)  # noqa: S311 - spreads load, guards nothing
    countdown = _before_redelivery(countdown)
    logger.warning("task waits task=%s seconds=%.1f waits=%d reason=%s", request.id, countdown, waited + 1, error)
    signature = task.signature_from_request(
        request,
        countdown=countdown,
        retries=request.retries,
        headers={**headers, WAITS_HEADER: waited + 1 if waits is None else waits},
    )
    try:
        signature.apply_async()
    except broker_errors(task.app) as refusal:
        return reject_after_pause(task, error, refusal)
    retry: Exception = Retry(exc=error, when=countdown, sig=signature)
    return retry


def waits_of(task: Task) -> int:
    """Return how often the running task has been requeued to wait."""
    return int((task.request.headers or {}).get(WAITS_HEADER) or 0)


def leave_to_later_attempt(error: HoldOvertakenError) -> Exception:
    """Return the exception that leaves the task to the attempt that has its hold, and requeues this message.

    Redis redelivers a message under the same delivery tag. If this attempt acknowledged it, it would be lost should the
    other attempt die too. After the requeue it waits at the gate for that attempt, and finds the work done.
    """
    return _rejected(error)


def retry_provider(task: Task, error: TrueupError) -> Exception:
    """Return the exception that retries up to the task's max_retries, then fails with the provider's own error."""
    countdown = _before_redelivery(PROVIDER_RETRY_BASE_SECONDS * 2**task.request.retries)
    try:
        retry: Exception = task.retry(exc=error, countdown=countdown, throw=False)
    except Reject as rejected:
        retry = rejected
    return retry


def reject_after_pause(task: Task, reason: Any, refusal: Any) -> Exception:
    """Return the exception that requeues the task's message, after the broker took no new one.

    The message comes back at once where only new messages are refused, so the task pauses first. If the broker is down,
    it redelivers the message: RabbitMQ when the connection is lost, Redis after the visibility timeout.
    """
    logger.warning(
        "broker took no new message, the task's own is requeued after a pause task=%s seconds=%.1f error=%s",
        task.request.id,
        REJECT_PAUSE_SECONDS,
        refusal,
    )
    time.sleep(REJECT_PAUSE_SECONDS)
    return _rejected(reason)


def _rejected(reason: Any) -> Exception:
    rejected: Exception = Reject(reason, requeue=True)
    return rejected


def _before_redelivery(countdown: float) -> float:
    """Keep a countdown below the visibility timeout: Redis would redeliver the waiting message and so duplicate it."""
    return min(countdown, get_settings().visibility_timeout_seconds / 2)
