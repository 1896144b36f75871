"""Connections to PostgreSQL: one lazy engine per process, and driver errors translated in one place."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from billing.errors import NotInstalledError, ServiceUnavailableError, TrueupError
from billing.settings import Settings, database_url, get_settings

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


def create_trueup_engine(settings: Settings) -> Engine:
    """Make an engine for the settings' database. Times are UTC, isolation is READ COMMITTED.

    A process that stops in the middle of a transaction loses it after a statement's time: others wait for its locks.
    `options` in the URL (a search_path, say) are kept.
    """
    url = make_url(database_url(settings))
    own_options = url.query.get("options", "")
    return create_engine(
        url,
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=settings.database_connect_timeout_seconds,
        connect_args={
            "connect_timeout": settings.database_connect_timeout_seconds,
            "application_name": "trueup",
            "options": (
                f"{own_options if isinstance(own_options, str) else ' '.join(own_options)} "
                f"-c timezone=UTC -c statement_timeout={settings.statement_timeout_seconds}s "
                f"-c idle_in_transaction_session_timeout={settings.statement_timeout_seconds}s "
                "-c default_transaction_isolation=read\\ committed"
            ),
        },
    )


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
    with translated_errors(), get_engine().connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def transaction() -> Iterator[Connection]:
    """Give a connection in a transaction, committed at the end and rolled back on an error.

    Raises `ServiceUnavailableError` or `NotInstalledError`.
    """
    with translated_errors(), get_engine().begin() as connection:
        yield connection


def retrying(operation: Callable[[Connection], Result]) -> Result:
    """Run an idempotent operation on a connection of `connect()`, and once more if that connection was dead.

    A server that was restarted leaves dead connections in the pool; finding out costs one failure, and SQLAlchemy
    then drops them all. Only for what may safely run twice: a read, or a write that is idempotent by key.
    """
    try:
        with connect() as connection:
            return operation(connection)
    except ServiceUnavailableError as error:
        cause = error.__cause__
        if not (isinstance(cause, DBAPIError) and cause.connection_invalidated):
            raise
    with connect() as connection:
        return operation(connection)


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


def _translate(error: DBAPIError) -> TrueupError | None:
    state = getattr(error.orig, "sqlstate", None)
    cause = str(error.orig).strip().partition("\n")[0]
    if state is None and type(error.orig).__name__ == "OperationalError":
        return ServiceUnavailableError("PostgreSQL", describe_database(), cause)
    if state is not None and state.startswith(_TRANSIENT):
        return ServiceUnavailableError("PostgreSQL", describe_database(), cause)
    if state is not None and state.startswith(_UNDEFINED):
        return NotInstalledError(
            f"The database at {describe_database()} is not ready for trueup: {cause}. Nothing was run. "
            "Run `trueup db init`, and check the table names under [host] in trueup.toml."
        )
    return None


def reason_of(error: BaseException) -> str:
    """Return an error in one line that may leave this machine: no SQL, no parameters, no row of the host's."""
    return (str(error.orig) if isinstance(error, DBAPIError) else str(error)).strip().partition("\n")[0][:500]


def describe_database() -> str:
    """Return where the database is, without its password."""
    url = make_url(database_url(get_settings()))
    host = url.host or url.query.get("host") or "localhost"
    return f"{host}:{url.port or 5432}/{url.database or ''}"
