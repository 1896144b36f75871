"""Create trueup's own tables, or upgrade them to the layout of this version.

A new database gets the tables of `trueup.database.schema`. A database in use runs the revisions in
`migrations/versions` that it lacks; `layout_1.py` there explains how a release adds a revision.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from trueup.database.layout import UNRELEASED, revision_of
from trueup.errors import NotInstalledError, OldLayoutError
from trueup.host.mapping import UserIdType

# Alembic is imported where it is used: that takes a tenth of a second, and most processes create no tables.
if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

MIGRATIONS = Path(__file__).parent / "migrations"


def create_tables(connection: Connection, user_id_type: UserIdType) -> None:
    """Create or upgrade trueup's tables in the caller's transaction. The schema must exist.

    Raises `OldLayoutError`, and `NotInstalledError` for the layout of a newer version.
    """
    from alembic import command

    config = _config(user_id_type, connection=connection)
    if _upgradable_revision(connection) is None:
        command.upgrade(config, _first_revision())
        command.stamp(config, "head")
    else:
        command.upgrade(config, "head")


def create_tables_sql(connection: Connection, user_id_type: UserIdType) -> str:
    """Return the statements that `create_tables` would run; empty if the layout is that of this version."""
    from alembic import command

    there = _upgradable_revision(connection)
    with io.StringIO() as output:
        config = _config(user_id_type, output=output)
        if there is None:
            first = _first_revision()
            command.upgrade(config, f"base:{first}", sql=True)
            command.stamp(config, f"{first}:head", sql=True)
        else:
            command.upgrade(config, f"{there}:head", sql=True)
        return output.getvalue().strip()


def newest_revision() -> str:
    """Return the revision of this version's layout."""
    return str(_revisions().get_current_head())


def _upgradable_revision(connection: Connection) -> str | None:
    revision = revision_of(connection)
    if revision in UNRELEASED:
        raise OldLayoutError(revision)
    known = {script.revision for script in _revisions().walk_revisions()}
    if revision is not None and revision not in known:
        raise NotInstalledError(
            f"trueup's tables in this database have the layout {revision}, which this version does not know: a newer "
            "version has upgraded them. Nothing was changed. Upgrade trueup on this machine."
        )
    return revision


def _first_revision() -> str:
    return str(_revisions().get_base())


def _revisions() -> "ScriptDirectory":
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(MIGRATIONS))


def _config(user_id_type: UserIdType, **attributes: object) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes.update(attributes, user_id_type=user_id_type)
    return config
