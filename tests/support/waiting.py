"""Wait for a condition, without a fixed pause, and with one deadline for all tests."""

import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_SECONDS = 120.0
"""A test's longest wait in seconds. Only a failing test waits this long; a loaded machine is far faster."""

Value = TypeVar("Value")


def wait_for(
    condition: Callable[[], Value], what: str = "the condition", *, seconds: float = DEADLINE_SECONDS
) -> Value:
    """Return the condition's first true value. Fails if there is none within the seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for: {what}"
        time.sleep(0.005)
    return value
