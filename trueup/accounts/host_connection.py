"""Reads on a connection of the host's, in its open transaction: they see what it has written and not committed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from trueup.database.calls import driver_query
from trueup.errors import InvalidInputError
from trueup.settings.settings import get_settings

# What decides about the meaning of trueup's statements: see trueup.database.session.
_SETTINGS = ("TimeZone", "search_path", "row_security")
_WANTED = {"search_path": "pg_catalog, pg_temp", "row_security": "off"}


class HostConnection:
    """A connection of the host's: SQLAlchemy's `Connection` or `Session`, Django's `connection`, or psycopg's."""

    def __init__(self, given: Any) -> None:
        if not isinstance(given, Connection) and callable(getattr(given, "connection", None)):
            given = given.connection()  # a session of SQLAlchemy's
        if not isinstance(given, Connection) and not callable(getattr(given, "cursor", None)):
            raise InvalidInputError(
                f"connection: {type(given).__name__} is no open database connection. Give SQLAlchemy's Connection or "
                "Session, Django's connection, or one of psycopg's"
            )
        self._given = given

    def execute(self, statement: TextClause, values: Mapping[str, Any] | None = None) -> list[Any]:
        """Return the rows of a statement, with their columns as attributes."""
        if isinstance(self._given, Connection):
            return list(self._given.execute(statement, values or {}))
        plain = {name: str(value) if isinstance(value, UUID) else value for name, value in (values or {}).items()}
        with self._given.cursor() as cursor:
            cursor.execute(driver_query(statement), plain)
            names = [column[0] for column in cursor.description]
            return [SimpleNamespace(**dict(zip(names, row, strict=True))) for row in cursor.fetchall()]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Give the transaction trueup's settings in this block, and the host's afterwards.

        An error leaves the transaction failed, as any error of PostgreSQL does; its rollback restores the settings.
        """
        wanted = _WANTED | {"TimeZone": get_settings().host.time_zone or "UTC"}
        [before] = self.execute(_SET, {f"new_{place}": wanted[name] for place, name in enumerate(_SETTINGS)})
        yield
        self.execute(_RESTORE, {f"new_{place}": getattr(before, f"old_{place}") for place in range(len(_SETTINGS))})


# With the schema: the first statement is resolved in the host's search path.
_NEW = ", ".join(
    f"pg_catalog.set_config('{name}', :new_{place}, true) AS now_{place}" for place, name in enumerate(_SETTINGS)
)
_OLD = ", ".join(f"pg_catalog.current_setting('{name}') AS old_{place}" for place, name in enumerate(_SETTINGS))
_SET = text(f"SELECT o.*, {_NEW} FROM (SELECT {_OLD} OFFSET 0) o")
_RESTORE = text(f"SELECT {_NEW}")
