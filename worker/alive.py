"""A file that each running worker of trueup touches, so that a health check starts no Celery process of its own.

The worker touches `<TRUEUP_HOME>/run/<node name>.alive` while its event loop runs and its broker answers. A health
check looks at the file's age: `find /var/lib/trueup/run -name '*.alive' -mmin -1 | grep -q .`
"""

import logging
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import heartbeat_sent

from trueup.settings.settings import get_settings

logger = logging.getLogger(__name__)

# Celery sends a heartbeat every two seconds.
TOUCH_EVERY_SECONDS = 5.0


def alive_file(node: str) -> Path:
    """Return the path of a worker's file. `node`: the worker's name, such as `trueup-ai@host`."""
    return get_settings().home / "run" / f"{node}.alive"


def touch_while_alive(app: Celery) -> None:
    """Let the application's worker touch its file. In a process that runs no such worker this does nothing."""
    touched_at = float("-inf")

    def touch(sender: Any, **_: Any) -> None:
        nonlocal touched_at
        if sender.eventer.app is not app or time.monotonic() - touched_at < TOUCH_EVERY_SECONDS:
            return
        touched_at = time.monotonic()
        path = alive_file(sender.eventer.hostname)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            # The worker works on; only health checks by the file fail.
            logger.warning("health file not touched path=%s error=%s", path, error)

    heartbeat_sent.connect(touch, weak=False)
