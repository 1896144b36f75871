"""Requeueing: how a task that can't run now comes back, and when."""

import logging
import random
from typing import Any

from celery import Task
from celery.exceptions import Reject, Retry
from kombu.exceptions import OperationalError

from trueup.errors import HoldOvertakenError, TrueupError
from trueup.settings.settings import get_settings

logger = logging.getLogger(__name__)

# How often this task has waited for the gate; kept apart from Celery's `retries`, which the body's own retries count.
WAITS_HEADER = "trueup_waits"
PROVIDER_RETRY_BASE_SECONDS = 2


def requeue(task: Task, error: TrueupError, seconds: float | None = None, *, waits: int | None = None) -> Exception:
    """Send the running task again, to be delivered in `seconds`, and return what the caller has to raise.

    `seconds` None: longer each time, up to the setting. `waits`: the number to come back with; None means one more than
    it came with. There is no last try: a task that could not be metered must neither run nor be lost.
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
    logger.warning("task waits %.1f s, for the %d. time: %s", countdown, waited + 1, error)
    signature = task.signature_from_request(
        request,
        countdown=countdown,
        retries=request.retries,
        headers={**headers, WAITS_HEADER: waited + 1 if waits is None else waits},
    )
    try:
        signature.apply_async()
    except OperationalError:
        # The broker is away too. Rejected and put back now or, if that fails, when it is not acknowledged in time.
        return _rejected(error)
    retry: Exception = Retry(exc=error, when=countdown, sig=signature)
    return retry


def waits_of(task: Task) -> int:
    """Return how often the running task's message has been sent back to wait."""
    return int((task.request.headers or {}).get(WAITS_HEADER) or 0)


def leave_to_later_attempt(error: HoldOvertakenError) -> Exception:
    """Return what to raise to leave the task to the attempt that has its hold, and its message to the broker.

    Redis delivers a message again under the same tag: acknowledged here, it would be lost if that attempt dies too. Put
    back, it waits for that attempt at the gate, and finds its work done.
    """
    return _rejected(error)


def retry_provider(task: Task, error: TrueupError) -> Exception:
    """Return what to raise to retry within the task's max_retries, then to give up with the provider's own error."""
    countdown = _before_redelivery(PROVIDER_RETRY_BASE_SECONDS * 2**task.request.retries)
    try:
        retry: Exception = task.retry(exc=error, countdown=countdown, throw=False)
    except Reject as rejected:
        # The broker is away. Celery would give the task up here: put back, it comes again.
        return _rejected(rejected.reason)
    return retry


def _rejected(reason: Any) -> Exception:
    rejected: Exception = Reject(reason, requeue=True)
    return rejected


def _before_redelivery(countdown: float) -> float:
    """Keep a countdown below the time after which Redis delivers a message again: else each wait would double it."""
    return min(countdown, get_settings().visibility_timeout_seconds / 2)
