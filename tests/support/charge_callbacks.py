"""Functions of a host for TRUEUP_ON_CHARGE. They write their charges into a file, so that a test can read it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from trueup import ChargeEvent

TOLD_VARIABLE = "CHARGES_TOLD"


def _file() -> Path:
    return Path(os.environ[TOLD_VARIABLE])


def told() -> list[dict[str, Any]]:
    """Return what `remember` got, in the order of its calls."""
    return [json.loads(line) for line in _file().read_text().splitlines()] if _file().exists() else []


def remember(event: ChargeEvent) -> None:
    line = {**vars(event), "charged_at": event.charged_at.isoformat()}
    with _file().open("a") as file:
        file.write(json.dumps(line) + "\n")


def die_at_first(event: ChargeEvent) -> None:
    """Kill this process at the first call, as a power failure between the commit and the host's write does."""
    mark = _file().with_suffix(".died")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    remember(event)


def fail(event: ChargeEvent) -> None:
    raise RuntimeError(f"no room for {event.total_tokens}\x00 tokens")


async def asynchronous(event: ChargeEvent) -> None:
    remember(event)
