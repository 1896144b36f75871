"""The layout of trueup's own tables in a database, and the refusal of a layout that no release can use.

Alembic keeps the layout as a revision in `trueup.alembic_version`; `trueup.database.migrate` upgrades it.
"""

from contextlib import suppress
from typing import Any

import psycopg
from sqlalchemy import Connection, text

from trueup.errors import OldLayoutError

# The revisions from before the first release. No release upgrades their tables.
UNRELEASED = frozenset(f"{number:04}" for number in range(1, 8))

# This reads the catalog, because to_regclass() fails in a schema without the right USAGE.
_EXISTS = """
    SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'trueup' AND c.relname = 'alembic_version'
"""
_READABLE = f"{_EXISTS} AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')"
_REVISION = "SELECT version_num FROM trueup.alembic_version"


def refuse_old_layout(connection: psycopg.Connection[Any]) -> None:
    """Close a new connection and raise `OldLayoutError` if its database has tables from before the first release.

    Every new connection is checked here, so no entry point needs its own check. A role that may not read trueup's
    tables is not refused, because it can't damage them.
    """
    connection.autocommit = True
    revision = None
    # The schema may be dropped between the two statements.
    with suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        if connection.execute(_READABLE).fetchone():
            revision = (connection.execute(_REVISION).fetchone() or (None,))[0]
    connection.autocommit = False
    if revision in UNRELEASED:
        connection.close()
        raise OldLayoutError(revision)


def revision_of(connection: Connection) -> str | None:
    """Return the revision of the database's layout; None if it has no tables of trueup."""
    if connection.execute(text(_EXISTS)).first() is None:
        return None
    revision: str | None = connection.scalar(text(_REVISION))
    return revision
