"""Waiting for a condition, never longer than a deadline."""

import time
from collections.abc import Callable

_MIN_SECONDS = 0.005
_MAX_SECONDS = 0.1


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Return True as soon as `condition()` holds, False when it has not within the time.

    Looks often at first, because servers usually start in a few milliseconds, then less often.
    """
    deadline = time.monotonic() + timeout_seconds
    pause = _MIN_SECONDS
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.3, _MAX_SECONDS)
    return True
