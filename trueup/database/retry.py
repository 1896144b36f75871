"""Retries: which database operations are retried, how often, and after which pause."""

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

# A database that is not ready may become ready: a migration changes its tables, or trueup is being set up again.
PASSING = (ServiceUnavailableError, NotInstalledError)
# The pauses before each further attempt to record usage.
RETRY_DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10)


def retry(
    operation: Callable[[], Result], passes: Callable[[TrueupError], bool], pauses: Iterable[float] = (0,)
) -> Result:
    """Run an operation, and retry it after each pause (seconds) if it fails with an error for which `passes` is true.

    Returns the operation's result. Raises the last error when there are no more pauses, and any other error at once.
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
    """Yield growing pauses in seconds, with random jitter so that two clients don't retry together, for `seconds`."""
    deadline, pause = time.monotonic() + seconds, first
    while time.monotonic() + pause <= deadline:
        yield random.uniform(pause / 2, pause)  # noqa: S311 - no secret
        pause = min(pause * 1.5, longest)


def once(operation: Callable[[Connection], Result]) -> Result:
    """Run an operation on a connection of `connect()`; retry it once if the log's partitions or values changed.

    The gate refuses such an operation before it does anything, and records the change.
    """

    def run() -> Result:
        with connect() as connection:
            return operation(connection)

    return retry(run, lambda error: isinstance(error, LogChangedError))


def retrying(operation: Callable[[Connection], Result]) -> Result:
    """Run an idempotent operation as `once()` does, and retry it if its connection was dead or out of date.

    After a restart of the server the pool has dead connections: the first failure makes SQLAlchemy drop them all. After
    an upgrade a connection may have prepared calls of replaced functions.
    The operation must be safe to run twice: a read, or a write that is idempotent by key.
    """
    return retry(lambda: once(operation), _is_dead_connection)


def _is_dead_connection(error: TrueupError) -> bool:
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and (cause.connection_invalidated or is_replaced(cause))


def retry_until_recorded(write: Callable[[Connection], Result], what: str) -> Result:
    """Record paid usage: run a write that is idempotent by key, and retry it for about 20 s.

    It is retried while the database does not answer or is not ready. `what`: the figures, which are logged if the last
    attempt fails. Raises the last error of `PASSING`.
    """
    try:
        return retry(lambda: retrying(write), lambda error: isinstance(error, PASSING), RETRY_DELAYS_SECONDS)
    except PASSING:
        logger.exception("usage not recorded: %s", what)
        raise
