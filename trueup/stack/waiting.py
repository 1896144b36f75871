"""Wait for a condition until a deadline."""

import time
from collections.abc import Callable

_MIN_SECONDS = 0.005
_MAX_SECONDS = 0.1


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Return True as soon as `condition()` is true, False after `timeout_seconds`.

    The pause between two checks grows, because servers usually start within a few milliseconds.
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
