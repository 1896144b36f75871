"""A new database gets the tables of the schema; a database in use runs the revisions that it lacks."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.support.dumps import pg_dump
from trueup.database import migrate
from trueup.database.layout import revision_of
from trueup.database.migrate import create_tables, create_tables_sql, newest_revision
from trueup.errors import NotInstalledError
from trueup.host.mapping import UserIdType

NEXT_REVISION = """
from alembic import op

revision = "layout_2"
down_revision = "layout_1"


def upgrade():
    op.execute("ALTER TABLE trueup.gate_mode ADD note text")
"""


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA trueup"))
    yield engine
    engine.dispose()


@pytest.fixture
def next_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Add a revision that alters a table."""
    folder = shutil.copytree(migrate.MIGRATIONS, tmp_path / "migrations")
    (folder / "versions" / "layout_2.py").write_text(NEXT_REVISION)
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "MIGRATIONS", folder)
        yield


def notes(connection: Connection) -> int:
    """Return how many columns the newest revision has added."""
    found: int = connection.execute(
        text("SELECT count(*) FROM pg_attribute WHERE attrelid = 'trueup.gate_mode'::regclass AND attname = 'note'")
    ).scalar_one()
    return found


def run(connection: Connection, script: str) -> None:
    connection.exec_driver_sql(script)


@pytest.mark.parametrize("user_id_type", ["bigint", "uuid", "text"])
def test_the_printed_statements_make_the_same_tables(
    engine: Engine, empty_database: str, user_id_type: UserIdType
) -> None:
    with engine.begin() as connection:
        create_tables(connection, user_id_type)
    made = pg_dump(empty_database)
    assert f"    user_id {user_id_type} NOT NULL," in made
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA trueup CASCADE; CREATE SCHEMA trueup"))
        run(connection, create_tables_sql(connection, user_id_type))
    assert pg_dump(empty_database) == made


def test_no_statement_is_printed_for_tables_of_this_layout(engine: Engine) -> None:
    with engine.begin() as connection:
        create_tables(connection, "bigint")
        assert revision_of(connection) == newest_revision()
        assert create_tables_sql(connection, "bigint") == ""
        create_tables(connection, "bigint")


def test_a_database_in_use_runs_the_revisions_that_it_lacks(engine: Engine, request: pytest.FixtureRequest) -> None:
    with engine.begin() as connection:
        create_tables(connection, "bigint")
    request.getfixturevalue("next_release")
    with engine.begin() as connection:
        script = create_tables_sql(connection, "bigint")
        create_tables(connection, "bigint")
        assert (revision_of(connection), notes(connection)) == ("layout_2", 1)
        connection.rollback()
    with engine.begin() as connection:
        assert "CREATE TABLE" not in script
        run(connection, script)
        assert (revision_of(connection), notes(connection)) == ("layout_2", 1)


@pytest.mark.usefixtures("next_release")
def test_a_new_database_gets_the_tables_of_the_schema_and_runs_no_later_revision(engine: Engine) -> None:
    with engine.begin() as connection:
        script = create_tables_sql(connection, "bigint")
        create_tables(connection, "bigint")
        assert (revision_of(connection), notes(connection)) == ("layout_2", 0)
        connection.rollback()
    with engine.begin() as connection:
        run(connection, script)
        assert (revision_of(connection), notes(connection)) == ("layout_2", 0)


def test_the_layout_of_a_newer_version_is_refused(engine: Engine, empty_database: str) -> None:
    with engine.begin() as connection:
        create_tables(connection, "bigint")
        connection.execute(text("UPDATE trueup.alembic_version SET version_num = 'layout_99'"))
    before = pg_dump(empty_database)
    for bring in (create_tables, create_tables_sql):
        with (
            pytest.raises(NotInstalledError, match=r"layout layout_99, .*newer version.*Upgrade trueup on"),
            engine.begin() as connection,
        ):
            bring(connection, "bigint")
    assert pg_dump(empty_database) == before
