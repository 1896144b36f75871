"""The heartbeat of running tasks: it renews their holds while the process lives, however long a body works."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy.exc import DBAPIError

from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.gate.holds import Hold, keep_holds
from trueup.settings.settings import get_settings

logger = logging.getLogger(__name__)

# Beats in the time of a lease: one or two may fail without harm.
BEATS_PER_LEASE = 3


class Heartbeat:
    """Renews the holds that run in this process, all of them by one statement, from a thread of its own.

    A process that is stopped or dead does not beat: the leases of its holds end, and another delivery takes over. A
    body that hangs in a living process keeps its hold until its time limit, or for `TRUEUP_HOLD_MAX_SECONDS`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holds: dict[int, Hold] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def keeping(self, hold: Hold) -> Iterator[None]:
        """Renew the hold until the block ends."""
        with self._changed:
            self._holds[id(hold)] = hold
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat_for_ever, name="trueup-heartbeat", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._holds[id(hold)]

    def _beat_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._holds)
            settings = get_settings()
            # Not to be woken: a task that ends before the next beat needs none.
            threading.Event().wait(min(settings.lease_seconds, settings.hold_ttl_seconds) / BEATS_PER_LEASE)
            with self._changed:
                holds = list(self._holds.values())
            if holds:
                _beat(holds)


def _beat(holds: list[Hold]) -> None:
    settings = get_settings()
    try:
        retrying(
            lambda connection: keep_holds(
                connection,
                holds,
                lease_seconds=settings.lease_seconds,
                ttl_seconds=settings.hold_ttl_seconds,
                max_seconds=settings.hold_max_seconds,
            )
        )
    except (TrueupError, DBAPIError) as error:
        logger.warning("heartbeat failed, leases were not renewed tasks=%d error=%s", len(holds), error)


_heartbeat = Heartbeat()


def keeping(hold: Hold) -> AbstractContextManager[None]:
    """Renew the hold by this process's heartbeat until the block ends."""
    return _heartbeat.keeping(hold)


def _begin_anew() -> None:
    """Forget the parent's holds and thread: a forked process has neither."""
    global _heartbeat
    _heartbeat = Heartbeat()


os.register_at_fork(after_in_child=_begin_anew)
