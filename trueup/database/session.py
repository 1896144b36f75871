"""Sessions: their limits, with or without a transaction pooler, and the reading of times without a zone.

A transaction pooler such as PgBouncer lends a server connection to a client for one transaction. A session setting
would stay on the server connection and affect the next client, a prepared statement may not exist on the next server
connection, and the pooler refuses most settings at login. With a pooler, therefore, each transaction sets its own
limits, and no statement is prepared.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self, cast

import psycopg
from psycopg import Connection, Cursor, ServerCursor
from psycopg.abc import Buffer, Params
from psycopg.pq import TransactionStatus
from psycopg.sql import SQL, Composed, Identifier, Literal
from psycopg.types.datetime import TimestampBinaryLoader, TimestampLoader
from psycopg.types.json import Json

# A pooler reports a process id of its own to the client, because it uses many server processes.
_SET_WHERE_OURS = """
    SELECT set_config(key, value, false) FROM json_each_text(%(limits)s) WHERE pg_backend_pid() = %(process)s
"""


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
        SQL("SET LOCAL {} = {}").format(Identifier(name), Literal(value)) for name, value in limits.items()
    )
    connection.prepare_threshold = None
    connection.cursor_factory = cast("type[Cursor[Any]]", partial(_PooledCursor, limits=statement))
    connection.server_cursor_factory = cast("type[ServerCursor[Any]]", partial(_PooledServerCursor, limits=statement))


class _PooledCursor(Cursor[Any]):
    """Sets the limits at the begin of each transaction. With autocommit each statement is a transaction."""

    def __init__(self, connection: Connection[Any], *, limits: Composed, **more: Any) -> None:
        super().__init__(connection, **more)
        self._limits = limits

    def execute(self, query: Any, params: "Params | None" = None, **more: Any) -> Self:
        connection = self.connection
        if connection.info.transaction_status != TransactionStatus.IDLE:
            return super().execute(query, params, **more)
        if not connection.autocommit:
            super().execute(self._limits)
            return super().execute(query, params, **more)
        try:
            super().execute(SQL("BEGIN ISOLATION LEVEL READ COMMITTED; ") + self._limits)
            super().execute(query, params, **more)
            connection.commit()
        except BaseException:
            with suppress(psycopg.Error):  # a lost connection has nothing to roll back
                connection.rollback()
            raise
        return self

    def executemany(self, query: Any, params_seq: Any, **more: Any) -> None:
        if self.connection.info.transaction_status == TransactionStatus.IDLE and not self.connection.autocommit:
            super().execute(self._limits)
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


class _UtcLoader(TimestampLoader):
    def load(self, data: Buffer) -> datetime:
        return super().load(data).replace(tzinfo=UTC)


class _UtcBinaryLoader(TimestampBinaryLoader):
    def load(self, data: Buffer) -> datetime:
        return super().load(data).replace(tzinfo=UTC)


def read_as_utc(connection: Connection) -> None:
    """Read each `timestamp` without a zone as UTC, the zone of the session. Many hosts store such times."""
    for loader in (_UtcLoader, _UtcBinaryLoader):
        connection.adapters.register_loader("timestamp", loader)
