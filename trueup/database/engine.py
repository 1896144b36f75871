"""Connections to PostgreSQL: one lazy engine per process, and driver errors translated in one place."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors
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
# Two threads that come first at once must not make two: one of them would never be closed.
_engine_lock = threading.Lock()

# trueup's objects, or the host's under the names of the mapping.
_UNDEFINED = (errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction, errors.UndefinedColumn)
# A column of another type: no such cast, datatype mismatch, an object of another kind.
_CHANGED_TYPES = (errors.CannotCoerce, errors.DatatypeMismatch, errors.WrongObjectType)


def create_trueup_engine(settings: Settings) -> Engine:
    """Make an engine for the settings' database. Times are UTC, isolation is READ COMMITTED.

    A process that stops in the middle of a transaction loses it after a statement's time: others wait for its locks.
    `options` in the URL are kept, except for the settings that `trueup.database.session` sets. A pooler in transaction
    mode may be in between.
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
            # Until the session's settings are set. A pooler accepts it in the login packet.
            "client_encoding": "UTF8",
        },
    )
    seconds = f"{settings.statement_timeout_seconds}s"

    def set_up(connection: psycopg.Connection[Any], _: object) -> None:
        limit_session(connection, session_settings(connection.info.server_version, seconds))

    # First of all: these settings also apply to the statements that SQLAlchemy sends on a new connection.
    event.listen(engine, "connect", set_up, insert=True)
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
        if is_replaced(error):
            connection.invalidate()
        raise


def _is_changed_type(error: DBAPIError) -> bool:
    if isinstance(error.orig, errors.InvalidTextRepresentation):
        # A value that a type does not have, met by a function of trueup's: a renamed label, which the mapping names.
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
        return _noted(cause)
    if not isinstance(error.orig, errors.InsufficientPrivilege):
        return None
    if is_raised_by(error, CHECK_ROW_SECURITY):
        return MissingRightError(
            f"The database at {where} would hide rows: {cause}. Nothing was run: sums would be too low. "
            f"{ROW_SECURITY_REMEDY}"
        )
    return MissingRightError(
        f"The database at {where} refused: {cause}. Grant it to trueup's role, and do this again: "
        "`trueup db grants` prints the statements, which the tables' owner runs."
    )


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


def describe_database() -> str:
    """Return where the database is, without its password."""
    url = make_url(database_url(get_settings()))
    host = url.host or url.query.get("host") or "localhost"
    return f"{host}:{url.port or 5432}/{url.database or ''}"
