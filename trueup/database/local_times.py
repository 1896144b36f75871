"""Times without a zone, as many hosts keep them: they are UTC, and have that zone from the moment they are read."""

from datetime import UTC, datetime

from psycopg import Connection
from psycopg.abc import Buffer
from psycopg.types.datetime import TimestampBinaryLoader, TimestampLoader


class _UtcLoader(TimestampLoader):
    def load(self, data: Buffer) -> datetime:
        return super().load(data).replace(tzinfo=UTC)


class _UtcBinaryLoader(TimestampBinaryLoader):
    def load(self, data: Buffer) -> datetime:
        return super().load(data).replace(tzinfo=UTC)


def read_as_utc(connection: Connection) -> None:
    """Have each `timestamp` that comes through this connection be one with a zone: UTC, as its session's is."""
    for loader in (_UtcLoader, _UtcBinaryLoader):
        connection.adapters.register_loader("timestamp", loader)
