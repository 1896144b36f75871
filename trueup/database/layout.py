"""Which layout trueup's own tables have in a database, and the refusal of one that no release can use.

Alembic keeps the layout as a revision in `trueup.alembic_version`; `trueup.database.migrate` moves it on.
"""

from contextlib import suppress
from typing import Any

import psycopg
from sqlalchemy import Connection, text

from trueup.errors import OldLayoutError

# The revisions of the time before the first release. No release upgrades their tables.
UNRELEASED = frozenset(f"{number:04}" for number in range(1, 8))

# Asked of the catalog, for to_regclass() is an error in a schema without the right USAGE.
_EXISTS = """
    SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'trueup' AND c.relname = 'alembic_version'
"""
_READABLE = f"{_EXISTS} AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')"
_REVISION = "SELECT version_num FROM trueup.alembic_version"


def refuse_old_layout(connection: psycopg.Connection[Any]) -> None:
    """Close a new connection and raise `OldLayoutError` if its database has tables from before the first release.

    Every connection of trueup passes here once, so that no entry point needs a check of its own. A role that may not
    read trueup's tables passes: it can do no harm to them.
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
    """Return the revision of the database's layout; None: it has no tables of trueup."""
    if connection.execute(text(_EXISTS)).first() is None:
        return None
    revision: str | None = connection.scalar(text(_REVISION))
    return revision
