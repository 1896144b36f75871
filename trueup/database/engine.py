"""Connections to PostgreSQL: one lazy engine per process, and driver errors translated in one place."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from trueup.database.layout import refuse_old_layout
from trueup.database.session import limit_session, read_as_utc
from trueup.errors import (
    LogChangedError,
    MissingRightError,
    NotInstalledError,
    ServiceUnavailableError,
    TrueupError,
)
from trueup.host.schema_changes import (
    LOG_CHANGED,
    ROW_SECURITY_REMEDY,
    UNWATCHED,
    changed_type,
    explain,
    not_ready,
    unwatched,
)
from trueup.settings.settings import Settings, database_url, get_settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_engine: Engine | None = None
_engine_pid: int | None = None
# Two threads that come first at once must not make two: one of them would never be closed.
_engine_lock = threading.Lock()

# SQLSTATE classes of a server that can't do the work now, though the same statement may succeed later: connection,
# transaction rollback (deadlock, serialization), resources, operator intervention, lock not available, a standby that
# takes no writes (until the failover is over), a session ended because it was idle in a transaction.
_TRANSIENT = ("08", "40", "53", "57", "55P03", "25006", "25P03")
# Undefined table, schema, function or column: trueup's objects, or the host's under the names of the mapping.
_UNDEFINED = ("42P01", "3F000", "42883", "42703")
# A column of another type: no such cast, datatype mismatch, an object of another kind.
_CHANGED_TYPES = ("42846", "42804", "42809")
_NO_OPERATOR = "operator does not exist"
# A value that a type does not have, met by a function of trueup's: a label that was renamed, which the mapping names.
_NO_SUCH_VALUE = "22P02"
_FORBIDDEN = "42501"
_ROW_SECURITY = "query would be affected by row-level security"
# A function that was replaced between its lookup and its call, or a statement prepared for what it returned before. The
# same statement succeeds on a connection that has not prepared it.
_REPLACED = (
    "cache lookup failed for ",
    "tuple concurrently ",
    "cached plan must not change result type",
    "could not open relation with OID",
)


def create_trueup_engine(settings: Settings) -> Engine:
    """Make an engine for the settings' database. Times are UTC, isolation is READ COMMITTED.

    A process that stops in the middle of a transaction loses it after a statement's time: others wait for its locks.
    `options` in the URL (a search_path, say) are kept. A pooler that lends connections out may be in between.
    """
    engine = create_engine(
        database_url(settings),
        isolation_level="READ COMMITTED",
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=settings.database_connect_timeout_seconds,
        connect_args={
            "connect_timeout": settings.database_connect_timeout_seconds,
            "application_name": "trueup",
        },
    )
    seconds = f"{settings.statement_timeout_seconds}s"
    limits = {
        "timezone": "UTC",
        "statement_timeout": seconds,
        "idle_in_transaction_session_timeout": seconds,
        "default_transaction_isolation": "read committed",
        # A sum over the rows that a policy leaves is too low: PostgreSQL then refuses.
        "row_security": "off",
    }
    # First of all: what SQLAlchemy asks of a new connection is limited too.
    event.listen(engine, "connect", lambda connection, _: limit_session(connection, limits), insert=True)
    event.listen(engine, "connect", lambda connection, _: read_as_utc(connection))
    event.listen(engine, "connect", lambda connection, _: refuse_old_layout(connection))
    return engine


def get_engine() -> Engine:
    """Return this process's engine.

    A forked child that went on with its parent's connections would read answers meant for others: it drops them
    unclosed, for they are still the parent's, and makes its own.
    """
    global _engine, _engine_pid
    pid = os.getpid()
    if _engine is not None and _engine_pid == pid:
        return _engine
    with _engine_lock:
        if _engine is None or _engine_pid != pid:
            if _engine is not None:
                _engine.dispose(close=False)
            _engine = create_trueup_engine(get_settings())
            _engine_pid = pid
        return _engine


def dispose_engine() -> None:
    """Close this process's connections and forget the engine; the next use reads the settings again."""
    global _engine
    if _engine is not None:
        _engine.dispose(close=_engine_pid == os.getpid())
    _engine = None


@contextmanager
def connect() -> Iterator[Connection]:
    """Give a connection on which each statement is its own transaction.

    For one server-side function, which is atomic by itself, this saves the round trips of BEGIN and COMMIT.
    Raises `ServiceUnavailableError` or `NotInstalledError`.
    """
    with translated_errors(), get_engine().connect() as connection, _forgetting(connection):
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def transaction() -> Iterator[Connection]:
    """Give a connection in a transaction, committed at the end and rolled back on an error.

    Raises `ServiceUnavailableError` or `NotInstalledError`.
    """
    with translated_errors(), get_engine().begin() as connection, _forgetting(connection):
        yield connection


def once(operation: Callable[[Connection], Result]) -> Result:
    """Run an operation on a connection of `connect()`; again only if the gate refused it before it did anything.

    So it does when partitions of the usage log have come or gone, or its values may be others: that is noted by then.
    """
    try:
        with connect() as connection:
            return operation(connection)
    except LogChangedError:
        pass
    with connect() as connection:
        return operation(connection)


def retrying(operation: Callable[[Connection], Result]) -> Result:
    """Run an idempotent operation as `once()` does, and again if its connection was of no use.

    A server that was restarted leaves dead connections in the pool; finding out costs one failure, and SQLAlchemy
    then drops them all. An upgrade replaces functions that a connection has prepared calls of.
    Only for what may safely run twice: a read, or a write that is idempotent by key.
    """
    try:
        return once(operation)
    except ServiceUnavailableError as error:
        cause = error.__cause__
        if not (isinstance(cause, DBAPIError) and (cause.connection_invalidated or _is_replaced(cause))):
            raise
    return once(operation)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the driver's errors in this block into `ServiceUnavailableError` or `NotInstalledError`."""
    try:
        yield
    except DBAPIError as error:
        translated = _translate(error)
        if translated is None:
            raise
        raise translated from error
    except PoolTimeoutError as error:
        cause = "every connection of this process is in use: raise TRUEUP_DATABASE_POOL_SIZE"
        raise ServiceUnavailableError("PostgreSQL", describe_database(), cause) from error


@contextmanager
def _forgetting(connection: Connection) -> Iterator[None]:
    """Close the connection after an error of what it has prepared: it would come again with each use."""
    try:
        yield
    except DBAPIError as error:
        if _is_replaced(error):
            connection.invalidate()
        raise


def _is_replaced(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) in ("XX000", "0A000") and any(
        known in str(error.orig) for known in _REPLACED
    )


def _is_unknown_label(error: DBAPIError) -> bool:
    diagnosis = getattr(error.orig, "diag", None)
    inside = "function" in str(getattr(diagnosis, "context", None) or "")
    return inside and getattr(error.orig, "sqlstate", None) == _NO_SUCH_VALUE


def _translate(error: DBAPIError) -> TrueupError | None:
    state = getattr(error.orig, "sqlstate", None)
    cause = str(error.orig).strip().partition("\n")[0]
    if _is_unknown_label(error) or (state == "42883" and cause.startswith(_NO_OPERATOR)):
        state = _CHANGED_TYPES[0]
    if state is None and type(error.orig).__name__ == "OperationalError":
        return ServiceUnavailableError("PostgreSQL", describe_database(), cause)
    if _is_replaced(error) or (state is not None and state.startswith(_TRANSIENT)):
        return ServiceUnavailableError("PostgreSQL", describe_database(), cause)
    if state in (*_UNDEFINED, *_CHANGED_TYPES, UNWATCHED):
        return _explained(cause, undefined=state in _UNDEFINED) or _unexplained(state)(describe_database(), cause)
    if state == LOG_CHANGED:
        return _noted(cause)
    if state == _FORBIDDEN and cause.startswith(_ROW_SECURITY):
        return MissingRightError(
            f"The database at {describe_database()} would hide rows: {cause}. Nothing was run: sums would be too low. "
            f"{ROW_SECURITY_REMEDY}"
        )
    if state == _FORBIDDEN:
        return MissingRightError(
            f"The database at {describe_database()} refused: {cause}. Grant it to trueup's role, and do this again: "
            "`trueup db grants` prints the statements, which the tables' owner runs."
        )
    return None


def _explained(cause: str, *, undefined: bool) -> NotInstalledError | None:
    """Look, on another connection, what of the host's is not there. None: nothing, or even that fails."""
    try:
        with get_engine().connect() as connection:
            return explain(connection, get_settings().host, describe_database(), cause, undefined=undefined)
    except (DBAPIError, PoolTimeoutError):
        return None


def _noted(cause: str) -> TrueupError:
    """Note what has become of the log, so that who asks again is answered. Returns the error to raise."""
    try:
        with translated_errors(), get_engine().begin() as connection:
            connection.execute(text("SELECT trueup.note_log()"))
    except TrueupError as error:
        return error
    logger.warning("%s: that counts from now on; balances may be built anew from it", cause)
    return LogChangedError(f"Nothing was run: {cause}. That is noted now: do this again.")


def _unexplained(state: str | None) -> Callable[[str, str], NotInstalledError]:
    if state == UNWATCHED:
        return unwatched
    return changed_type if state in _CHANGED_TYPES else not_ready


def reason_of(error: BaseException) -> str:
    """Return an error in one line that may leave this machine: no SQL, no parameters, no row of the host's."""
    return (str(error.orig) if isinstance(error, DBAPIError) else str(error)).strip().partition("\n")[0][:500]


def describe_database() -> str:
    """Return where the database is, without its password."""
    url = make_url(database_url(get_settings()))
    host = url.host or url.query.get("host") or "localhost"
    return f"{host}:{url.port or 5432}/{url.database or ''}"
