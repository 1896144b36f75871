"""Sessions: their settings, with or without a transaction pooler, and the reading of times without a zone.

A role, a database or a server may set anything for new sessions. trueup itself sets what decides about the meaning of a
statement, the form of its values, or the time after which the server gives up: `FIXED_SETTINGS`.

A transaction pooler such as PgBouncer lends a server connection to a client for one transaction. A session setting
would stay on the server connection and affect the next client, a prepared statement may not exist on the next server
connection, and the pooler refuses most settings at login. With a pooler, therefore, each transaction sets its own
settings, and no statement is prepared.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Self, cast
from zoneinfo import ZoneInfo

import psycopg
from psycopg import Connection, Cursor, ServerCursor
from psycopg.abc import Buffer, Params
from psycopg.pq import TransactionStatus
from psycopg.sql import SQL, Composable, Composed, Identifier, Literal
from psycopg.types.datetime import (
    TimestampBinaryLoader,
    TimestampLoader,
    TimestamptzBinaryLoader,
    TimestamptzLoader,
)
from psycopg.types.json import Json

# Where names without a schema are looked up. No role can create anything in pg_catalog or in another session's pg_temp,
# so no function or operator of another role is called in place of PostgreSQL's own.
SEARCH_PATH = "pg_catalog, pg_temp"
FIXED_SETTINGS = {
    "search_path": SEARCH_PATH,
    "timezone": "UTC",
    "default_transaction_isolation": "read committed",
    # A sum over the rows that a policy leaves is too low: PostgreSQL then refuses.
    "row_security": "off",
    # How values are read and written.
    "client_encoding": "UTF8",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # `statement_timeout` bounds every wait: a shorter limit of the role would fail a charge that only has to wait.
    "lock_timeout": "0",
    "idle_session_timeout": "0",
}
# Settings that older servers do not know, with the version that has them.
_NEWER_SETTINGS = {"transaction_timeout": ("0", 170000)}

# A pooler reports a process id of its own, which differs from the server's.
_SET_WHERE_OURS = """
    SELECT pg_catalog.set_config(s.key, s.value, false) FROM pg_catalog.json_each_text(%(limits)s) AS s (key, value)
    WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) CAST(%(process)s AS pg_catalog.int4)
"""


def session_settings(server_version: int, statement_timeout: str, time_zone: str = "UTC") -> dict[str, str]:
    """Return all settings of a session.

    `server_version`: as libpq gives it (170002). `statement_timeout`: "30s". `time_zone`: of the host's times that have
    none. PostgreSQL converts between these and times with a zone by the zone of the session.
    """
    newer = {name: value for name, (value, since) in _NEWER_SETTINGS.items() if server_version >= since}
    limits = {"statement_timeout": statement_timeout, "idle_in_transaction_session_timeout": statement_timeout}
    return FIXED_SETTINGS | newer | limits | {"timezone": time_zone}


def limit_session(connection: Connection[Any], limits: Mapping[str, str]) -> None:
    """Apply these settings to all statements on a new connection, with or without a pooler.

    A transaction that begins without an explicit isolation level is READ COMMITTED.
    """
    values = {"limits": Json(dict(limits)), "process": connection.info.backend_pid}
    connection.autocommit = True
    ours = connection.execute(_SET_WHERE_OURS, values).fetchall()
    connection.autocommit = False
    if not ours:
        limit_transactions(connection, limits)


def limit_transactions(connection: Connection[Any], limits: Mapping[str, str]) -> None:
    """Make each transaction on this connection set these limits first, and leave nothing on the server connection."""
    statement = SQL("; ").join(
        SQL("SET LOCAL {} = {}").format(Identifier(name), _setting(name, value)) for name, value in limits.items()
    )
    connection.prepare_threshold = None
    connection.cursor_factory = cast("type[Cursor[Any]]", partial(_PooledCursor, limits=statement))
    connection.server_cursor_factory = cast("type[ServerCursor[Any]]", partial(_PooledServerCursor, limits=statement))


def _setting(name: str, value: str) -> Composable:
    # A list: as one literal, it would be the name of one schema.
    return SQL(value) if name == "search_path" else Literal(value)


class _PooledCursor(Cursor[Any]):
    """Sets the limits at the begin of each transaction. With autocommit each statement is a transaction."""

    def __init__(self, connection: Connection[Any], *, limits: Composed, **more: Any) -> None:
        super().__init__(connection, **more)
        self._limits = limits

    def execute(self, query: Any, params: "Params | None" = None, **more: Any) -> Self:
        connection = self.connection
        if connection.info.transaction_status != TransactionStatus.IDLE:
            return super().execute(query, params, **more)
        # With a plain cursor: one with binary answers can't send several commands at once.
        if not connection.autocommit:
            Cursor(connection).execute(self._limits)
            return super().execute(query, params, **more)
        try:
            Cursor(connection).execute(SQL("BEGIN ISOLATION LEVEL READ COMMITTED; ") + self._limits)
            super().execute(query, params, **more)
            connection.commit()
        except BaseException:
            with suppress(psycopg.Error):  # a lost connection has nothing to roll back
                connection.rollback()
            raise
        return self

    def executemany(self, query: Any, params_seq: Any, **more: Any) -> None:
        if self.connection.info.transaction_status == TransactionStatus.IDLE and not self.connection.autocommit:
            Cursor(self.connection).execute(self._limits)
        super().executemany(query, params_seq, **more)


class _PooledServerCursor(ServerCursor[Any]):
    """The same for server-side cursors, which PostgreSQL has only in transactions."""

    def __init__(self, connection: Connection[Any], name: str, *, limits: Composed, **more: Any) -> None:
        super().__init__(connection, name, **more)
        self._limits = limits

    def execute(self, query: Any, params: "Params | None" = None, **more: Any) -> Self:
        if self.connection.info.transaction_status == TransactionStatus.IDLE and not self.connection.autocommit:
            Cursor(self.connection).execute(self._limits)
        return super().execute(query, params, **more)


def _offset(moment: datetime) -> timedelta:
    return moment.utcoffset() or timedelta(0)


def read_as_utc(connection: Connection, time_zone: str = "UTC") -> None:
    """Read every time as UTC. A `timestamp` without a zone is in `time_zone`, the zone of the session."""
    zone = UTC if time_zone == "UTC" else ZoneInfo(time_zone)

    def in_zone(moment: datetime) -> datetime:
        read = moment.replace(tzinfo=zone)
        # PostgreSQL reads a time that a change of clocks repeats as the second one.
        again = read.replace(fold=1)
        try:
            return (again if _offset(again) < _offset(read) else read).astimezone(UTC)
        except OverflowError:  # in the first or the last hours that Python has
            return moment.replace(tzinfo=UTC)

    class LocalLoader(TimestampLoader):
        def load(self, data: Buffer) -> datetime:
            return in_zone(super().load(data))

    class LocalBinaryLoader(TimestampBinaryLoader):
        def load(self, data: Buffer) -> datetime:
            return in_zone(super().load(data))

    for loader in (LocalLoader, LocalBinaryLoader):
        connection.adapters.register_loader("timestamp", loader)
    if zone is UTC:
        return  # psycopg gives times of the session's zone

    class UtcLoader(TimestamptzLoader):
        def load(self, data: Buffer) -> datetime:
            return super().load(data).astimezone(UTC)

    class UtcBinaryLoader(TimestamptzBinaryLoader):
        def load(self, data: Buffer) -> datetime:
            return super().load(data).astimezone(UTC)

    for with_zone in (UtcLoader, UtcBinaryLoader):
        connection.adapters.register_loader("timestamptz", with_zone)
