"""The heartbeat of a process: it renews the holds of its tasks, requests and streams while the process lives."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

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

    A process that is stopped or dead does not beat: the leases of its holds end, and another delivery takes over. Work
    that hangs in a living process keeps its hold until its time limit, or for `TRUEUP_HOLD_MAX_SECONDS`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Weak: a hold that its owner has dropped without closing it is not renewed, and expires.
        self._holds: WeakValueDictionary[int, Hold] = WeakValueDictionary()
        self._thread: threading.Thread | None = None

    def keep(self, hold: Hold) -> None:
        """Renew the hold from now on."""
        with self._changed:
            self._holds[id(hold)] = hold
            if self._thread is None:
                thread = threading.Thread(target=self._beat_for_ever, name="trueup-heartbeat", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def stop(self, hold: Hold) -> None:
        """Renew the hold no more. Does nothing if this process does not renew it."""
        with self._changed:
            self._holds.pop(id(hold), None)

    def _beat_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._holds)
            settings = get_settings()
            # Not to be woken: work that ends before the next beat needs none.
            threading.Event().wait(min(settings.lease_seconds, settings.hold_ttl_seconds) / BEATS_PER_LEASE)
            self._beat_once()

    def _beat_once(self) -> None:
        with self._changed:
            # A copy: the garbage collector may close a dropped stream here, and so stop its hold.
            references = self._holds.valuerefs()
        holds = [hold for reference in references if (hold := reference()) is not None]
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
        logger.warning("heartbeat failed, leases were not renewed holds=%d error=%s", len(holds), error)


_heartbeat = Heartbeat()


def keep(hold: Hold) -> None:
    """Renew the hold by this process's heartbeat until `stop_keeping`, or until the object is gone."""
    _heartbeat.keep(hold)


def stop_keeping(hold: Hold) -> None:
    """Renew the hold no more, before it is closed."""
    _heartbeat.stop(hold)


@contextmanager
def keeping(hold: Hold) -> Iterator[None]:
    """Renew the hold by this process's heartbeat until the block ends."""
    keep(hold)
    try:
        yield
    finally:
        stop_keeping(hold)


def _begin_anew() -> None:
    """Forget the parent's holds and thread: a forked process has neither."""
    global _heartbeat
    _heartbeat = Heartbeat()


os.register_at_fork(after_in_child=_begin_anew)
