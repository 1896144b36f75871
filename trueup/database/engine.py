"""Connections to PostgreSQL: one lazy engine per process, and driver errors translated in one place."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from trueup.database.driver_errors import (
    CHECK_ROW_SECURITY,
    FIND_OPERATOR,
    LOG_CHANGED,
    UNWATCHED,
    is_raised_by,
    is_replaced,
    is_transient,
    sqlstate_of,
)
from trueup.database.encoding import refuse_other_encodings
from trueup.database.layout import refuse_old_layout
from trueup.database.session import limit_session, read_as_utc, session_settings
from trueup.errors import (
    LogChangedError,
    MissingRightError,
    NotInstalledError,
    ServiceUnavailableError,
    TrueupError,
)
from trueup.host.schema_changes import ROW_SECURITY_REMEDY, changed_type, explain, not_ready, unwatched
from trueup.settings.settings import Settings, database_url, get_settings

logger = logging.getLogger(__name__)

_engine: Engine | None = None
_engine_pid: int | None = None
# Without the lock, the first two threads could each create an engine, and one of them would never be closed.
_engine_lock = threading.Lock()

# A missing object of trueup's, or of the host's under a name of the mapping.
_UNDEFINED = (errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction, errors.UndefinedColumn)
# A column has another type: a missing cast, a datatype mismatch, or an object of another kind.
_CHANGED_TYPES = (errors.CannotCoerce, errors.DatatypeMismatch, errors.WrongObjectType)


def create_trueup_engine(settings: Settings) -> Engine:
    """Create an engine for the settings' database. Times come as UTC, and the isolation level is READ COMMITTED.

    The server ends a transaction that is idle for the statement timeout, because other transactions wait for its locks.
    `options` in the URL are kept, except for the settings that `trueup.database.session` sets. A transaction pooler may
    be in between.
    """
    engine = create_engine(
        database_url(settings),
        isolation_level="READ COMMITTED",
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_reset_on_return=None,
        pool_timeout=settings.database_connect_timeout_seconds,
        use_native_hstore=False,  # to look for the extension would cost a query
        connect_args={
            "connect_timeout": settings.database_connect_timeout_seconds,
            "application_name": "trueup",
            # Until the session's settings are set. A pooler accepts it in the login packet.
            "client_encoding": "UTF8",
        },
    )
    seconds, time_zone = f"{settings.statement_timeout_seconds}s", settings.host.time_zone or "UTC"

    def set_up(connection: psycopg.Connection[Any], _: object) -> None:
        limit_session(connection, session_settings(connection.info.server_version, seconds, time_zone))

    # `insert`: run before SQLAlchemy's own listeners, so that these settings apply to their statements too. Those can't
    # read the answers of a database in another encoding. The listener inserted last runs first.
    event.listen(engine, "connect", set_up, insert=True)
    event.listen(engine, "connect", lambda connection, _: refuse_other_encodings(connection), insert=True)
    event.listen(engine, "connect", lambda connection, _: read_as_utc(connection, time_zone))
    event.listen(engine, "connect", lambda connection, _: refuse_old_layout(connection))
    event.listen(engine, "reset", _make_reusable)
    return engine


def _make_reusable(connection: psycopg.Connection[Any], _record: object, _state: object) -> None:
    """End what a connection that returns to the pool is in. If that raises, SQLAlchemy closes the connection.

    It replaces SQLAlchemy's own rollback, which costs time without a transaction too.
    """
    if connection.pgconn.transaction_status != TransactionStatus.IDLE:
        connection.rollback()
    if connection.autocommit:
        connection.autocommit = False


def get_engine() -> Engine:
    """Return this process's engine.

    A forked child must not use its parent's connections, because it would read the parent's answers. The child forgets
    them without closing them, since the parent still uses them, and creates its own engine.
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
    """Close this process's connections and drop the engine. The next use reads the settings again."""
    global _engine
    if _engine is not None:
        _engine.dispose(close=_engine_pid == os.getpid())
    _engine = None


@contextmanager
def connect() -> Iterator[Connection]:
    """Yield a connection on which each statement is its own transaction.

    For a single SQL function, which is atomic, this saves the round trips of BEGIN and COMMIT.
    Raises `ServiceUnavailableError` or `NotInstalledError`.
    """
    with translated_errors(), get_engine().connect() as connection, _dropping_replaced(connection):
        # SQLAlchemy's isolation level AUTOCOMMIT does the same, in three times the time. `_make_reusable` undoes it.
        cast("psycopg.Connection[Any]", connection.connection.dbapi_connection).autocommit = True
        yield connection


@contextmanager
def transaction() -> Iterator[Connection]:
    """Yield a connection in a transaction, which commits at the end and rolls back on an error.

    Raises `ServiceUnavailableError` or `NotInstalledError`.
    """
    with translated_errors(), get_engine().begin() as connection, _dropping_replaced(connection):
        yield connection


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
        cause = "this process uses all its connections. Raise TRUEUP_DATABASE_POOL_SIZE"
        raise ServiceUnavailableError("PostgreSQL", describe_database(), cause) from error


@contextmanager
def _dropping_replaced(connection: Connection) -> Iterator[None]:
    """Close the connection if its prepared statements are out of date: each use would raise the same error."""
    try:
        yield
    except DBAPIError as error:
        if is_replaced(error):
            connection.invalidate()
        raise


def _is_changed_type(error: DBAPIError) -> bool:
    if isinstance(error.orig, errors.InvalidTextRepresentation):
        # A function of trueup's used a value that the type does not have, such as a renamed label in the mapping.
        return "function" in str(error.orig.diag.context)
    no_operator = isinstance(error.orig, errors.UndefinedFunction) and is_raised_by(error, FIND_OPERATOR)
    return no_operator or isinstance(error.orig, _CHANGED_TYPES)


def _translate(error: DBAPIError) -> TrueupError | None:
    where, cause = describe_database(), str(error.orig).strip().partition("\n")[0]
    if is_transient(error):
        return ServiceUnavailableError("PostgreSQL", where, cause)
    if _is_changed_type(error):
        return _explained(cause, undefined=False) or changed_type(where, cause)
    if isinstance(error.orig, _UNDEFINED):
        return _explained(cause, undefined=True) or not_ready(where, cause)
    if sqlstate_of(error) == UNWATCHED:
        return _explained(cause, undefined=False) or unwatched(where, cause)
    if sqlstate_of(error) == LOG_CHANGED:
        return _record_log_change(cause)
    if not isinstance(error.orig, errors.InsufficientPrivilege):
        return None
    if is_raised_by(error, CHECK_ROW_SECURITY):
        return MissingRightError(
            f"Row-level security in the database at {where} hides rows: {cause}. Nothing was run, because sums would "
            f"be too low. {ROW_SECURITY_REMEDY}"
        )
    return MissingRightError(
        f"The database at {where} refused: {cause}. Grant it to trueup's role, then retry the operation. `trueup db "
        "grants` prints the statements, which the tables' owner runs."
    )


def _explained(cause: str, *, undefined: bool) -> NotInstalledError | None:
    """Return the error that names the host's missing objects, read on another connection.

    None if nothing is missing, or if this read fails too.
    """
    try:
        with get_engine().connect() as connection:
            return explain(connection, get_settings().host, describe_database(), cause, undefined=undefined)
    except (DBAPIError, PoolTimeoutError):
        return None


def _record_log_change(cause: str) -> TrueupError:
    """Record the change of the usage log, so that a retry succeeds. Returns the error to raise."""
    try:
        with translated_errors(), get_engine().begin() as connection:
            connection.execute(text("SELECT trueup.record_log_state()"))
    except TrueupError as error:
        return error
    logger.warning("usage log changed, balances may be rebuilt from it cause=%r", cause)
    return LogChangedError(f"Nothing was run: {cause}. The change is recorded now. Retry the operation.")


def describe_database() -> str:
    """Return the database's host, port and name, without its password."""
    url = make_url(database_url(get_settings()))
    host = url.host or url.query.get("host") or "localhost"
    return f"{host}:{url.port or 5432}/{url.database or ''}"
