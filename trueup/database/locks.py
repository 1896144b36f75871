"""Installation steps that lock tables of a running host: each has its own transaction and waits briefly for locks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from psycopg.errors import DeadlockDetected, LockNotAvailable
from sqlalchemy import Connection, text

from trueup.database.engine import connect, transaction
from trueup.database.retry import growing_pauses, retry
from trueup.errors import ServiceUnavailableError, TrueupError

Result = TypeVar("Result")

# The key of an advisory lock: "trueup" in ASCII. No other program on this database may use the same number.
INSTALL_LOCK = 0x747275657570

# Transactions that queue behind a step wait at most as long as the step itself waits.
LOCK_TIMEOUT_MILLISECONDS = 50
STATEMENT_TIMEOUT_SECONDS = 300
PATIENCE_SECONDS = 60.0
_MAX_PAUSE_SECONDS = 1.0


class HostBusyError(TrueupError):
    """Other transactions held the locks that a step needs for too long. The step was not done; earlier steps were."""


def take_step(
    step: Callable[[Connection], Result], tables: Sequence[str] = (), *, patience_seconds: float = PATIENCE_SECONDS
) -> Result:
    """Run a step in its own transaction, and retry it after a pause while another transaction holds its locks.

    Each attempt waits at most `LOCK_TIMEOUT_MILLISECONDS` for each lock. Installers take turns, step by step.
    `tables`: the host's tables that the step locks, as SQL names them. `patience_seconds`: the time for all attempts.
    Returns the step's result. Raises `HostBusyError` when the time is over.
    """

    def take() -> Result:
        with transaction() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_MILLISECONDS}ms'"))
            connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": INSTALL_LOCK})
            # While a session waits for an advisory lock, it does not learn which functions were replaced. Locking a
            # table makes it process these messages.
            connection.execute(text("LOCK TABLE pg_catalog.pg_proc IN ACCESS SHARE MODE"))
            return step(connection)

    # Between the attempts the host's writers proceed.
    pauses = growing_pauses(LOCK_TIMEOUT_MILLISECONDS / 1000, _MAX_PAUSE_SECONDS, seconds=patience_seconds)
    try:
        return retry(take, _is_locked, pauses)
    except ServiceUnavailableError as error:
        if not _is_locked(error):
            raise
        raise HostBusyError(_busy(tables, patience_seconds)) from error


def _is_locked(error: TrueupError) -> bool:
    # DeadlockDetected: the server may check for deadlocks before the lock timeout ends.
    return isinstance(getattr(error.__cause__, "orig", None), LockNotAvailable | DeadlockDetected)


_HOLDERS = text(
    """
    SELECT a.pid, a.application_name AS name, round(extract(epoch FROM clock_timestamp() - a.xact_start)) AS seconds
    FROM pg_stat_activity a
    WHERE a.pid <> pg_backend_pid() AND a.xact_start IS NOT NULL AND EXISTS (
        SELECT FROM pg_locks l
        WHERE l.pid = a.pid AND l.granted AND l.locktype = 'relation'
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND (l.relation = ANY (CAST(CAST(:tables AS text[]) AS regclass[]))
               OR l.relation IN (SELECT oid FROM pg_class WHERE relnamespace = to_regnamespace('trueup'))))
    ORDER BY a.xact_start LIMIT 3
    """
)


def _busy(tables: Sequence[str], patience_seconds: float) -> str:
    with connect() as connection:
        holders = connection.execute(_HOLDERS, {"tables": list(tables)}).all()
    named = ", ".join(f"process {row.pid} ({row.name or 'unnamed'}, for {row.seconds} s)" for row in holders)
    return (
        f"Other transactions locked {', '.join(tables) or 'the tables of trueup'} for {patience_seconds:.0f} s"
        f"{f': {named}' if named else ''}. Earlier steps are kept. Wait until these transactions end, then run the "
        "command again."
    )
