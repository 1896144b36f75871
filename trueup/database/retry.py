"""Retries: which work on the database is tried again, how often, and after which pause."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from trueup.database.driver_errors import is_replaced
from trueup.database.engine import connect
from trueup.errors import LogChangedError, NotInstalledError, ServiceUnavailableError, TrueupError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A database that is not ready may be soon: a migration changes its tables, or trueup is being set up again.
PASSING = (ServiceUnavailableError, NotInstalledError)
# How long a write of usage waits before each further try.
RETRY_DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10)


def retry(
    operation: Callable[[], Result], passes: Callable[[TrueupError], bool], pauses: Iterable[float] = (0,)
) -> Result:
    """Run an operation, and again after each pause (seconds) for as long as it fails with an error that `passes`.

    Returns its result. Raises its last error, and at once one that does not pass.
    """
    for pause in pauses:
        try:
            return operation()
        except TrueupError as error:
            if not passes(error):
                raise
        time.sleep(pause)
    return operation()


def growing_pauses(first: float, longest: float, *, seconds: float) -> Iterator[float]:
    """Yield ever longer pauses, each random so that two who retry don't meet again, until `seconds` from now."""
    deadline, pause = time.monotonic() + seconds, first
    while time.monotonic() + pause <= deadline:
        yield random.uniform(pause / 2, pause)  # noqa: S311 - no secret
        pause = min(pause * 1.5, longest)


def once(operation: Callable[[Connection], Result]) -> Result:
    """Run an operation on a connection of `connect()`; again only if the gate refused it before it did anything.

    The gate refuses when the usage log's partitions or values changed. The change is recorded by then.
    """

    def run() -> Result:
        with connect() as connection:
            return operation(connection)

    return retry(run, lambda error: isinstance(error, LogChangedError))


def retrying(operation: Callable[[Connection], Result]) -> Result:
    """Run an idempotent operation as `once()` does, and again if its connection was of no use.

    A server that was restarted leaves dead connections in the pool; finding out costs one failure, and SQLAlchemy
    then drops them all. An upgrade replaces functions that a connection has prepared calls of.
    Only for what may safely run twice: a read, or a write that is idempotent by key.
    """
    return retry(lambda: once(operation), _is_dead_connection)


def _is_dead_connection(error: TrueupError) -> bool:
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and (cause.connection_invalidated or is_replaced(cause))


def retry_until_recorded(write: Callable[[Connection], Result], what: str) -> Result:
    """Record usage, which was paid for: run a write that is idempotent by key, for about 20 s while it fails.

    It is tried again while the database does not answer or is not ready. `what`: the figures; they are logged if the
    last try fails. Raises the last error of `PASSING`.
    """
    try:
        return retry(lambda: retrying(write), lambda error: isinstance(error, PASSING), RETRY_DELAYS_SECONDS)
    except PASSING:
        logger.exception("usage not recorded: %s", what)
        raise
