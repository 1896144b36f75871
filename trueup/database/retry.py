"""Writes that stand for money spent: while the database is away they are tried again, and never given up silently."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from trueup.database.engine import retrying
from trueup.errors import NotInstalledError, ServiceUnavailableError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A database that is not ready may be: its tables are just being changed, or trueup is being set up anew.
PASSING = (ServiceUnavailableError, NotInstalledError)
# How long a write waits before each further try.
RETRY_DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10)


def retry_until_recorded(write: Callable[[Connection], Result], what: str) -> Result:
    """Run a write that is idempotent by key, and again for about 20 s while the database is away or not ready.

    `what`: the figures, for the log, if it is all in vain. Then it raises the one of `PASSING` that it met last.
    """
    for delay in RETRY_DELAYS_SECONDS:
        try:
            return retrying(write)
        except PASSING:
            time.sleep(delay)
    try:
        return retrying(write)
    except PASSING:
        logger.exception("usage not recorded: %s", what)
        raise
