"""A slow task. A worker registers it with `-I tests.support.slow_tasks`."""

import time

from celery import shared_task


@shared_task(name="test.slow", acks_late=True)
def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "done"
