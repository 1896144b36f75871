"""Tables from before the first release: every entry point raises the same error, and changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.support.dumps import pg_dump
from tests.support.host import Host
from trueup.billing.decorators import check_tokens_for_function
from trueup.cli import main
from trueup.cli.demo.stack import clear_tables
from trueup.database.engine import create_trueup_engine, dispose_engine
from trueup.errors import OldLayoutError, TrueupError
from trueup.llm.model import Model
from trueup.settings.settings import get_settings
from trueup.tasks import metered_task

# The newest old layout has the tables of today. The oldest had fewer tables; these are two of them.
NEWEST = "UPDATE trueup.alembic_version SET version_num = '0007'"
OLDEST = """
    DROP SCHEMA trueup CASCADE;
    CREATE SCHEMA trueup;
    CREATE TABLE trueup.alembic_version (version_num varchar(32) PRIMARY KEY);
    INSERT INTO trueup.alembic_version VALUES ('0001');
    CREATE TABLE trueup.installation (
        singleton boolean DEFAULT true PRIMARY KEY,
        mapping_fingerprint text NOT NULL,
        mapping jsonb NOT NULL,
        installed_at timestamptz DEFAULT now() NOT NULL
    );
    INSERT INTO trueup.installation (mapping_fingerprint, mapping) VALUES ('0', '{"user_id_type": "bigint"}');
    CREATE TABLE trueup.balance (
        user_id bigint PRIMARY KEY,
        window_start timestamptz NOT NULL,
        log_epoch bigint NOT NULL,
        consumed bigint DEFAULT 0 NOT NULL,
        held bigint DEFAULT 0 NOT NULL
    );
"""


@metered_task(name="test.old_layout", feature_name="Test", section="chat", estimated_tokens=10)
def answer(model: Model, user_id: int) -> None:
    raise AssertionError("the gate let it pass")


@pytest.fixture(params=["0001", "0007"])
def revision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def old_database(database: str, revision: str) -> Iterator[str]:
    """Yield the URL of a database with the old layout, a user and usage. The test must not change it."""
    engine = create_engine(database, poolclass=NullPool)
    with Host(engine) as host:
        host.log(host.subscriber(counter=9_000), 100)
        host.execute(OLDEST if revision == "0001" else NEWEST)
    engine.dispose()
    before = pg_dump(database)
    yield database
    dispose_engine()
    assert pg_dump(database) == before


def assert_tells(error: str, revision: str) -> None:
    assert f"layout of an earlier version (revision {revision})" in error
    assert error.index("trueup db detach` with the version that made") < error.index(
        "trueup db attach` with this version"
    )
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "command",
    [
        "db init",
        "db init --with-host-tables --replace",
        "db attach --yes",
        "db attach --dry-run",
        "db detach --yes --force",
        "db grants",
        "reconcile",
        "reconcile --deep --jobs 2",
        "drift report",
        "drift report --read-only",
        "tokens check 2 --tokens 10",
        "status",
    ],
)
def test_every_command_refuses_it_and_says_what_to_do(old_database: str, revision: str, command: str) -> None:
    done = CliRunner().invoke(main, command.split(), catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert_tells(done.stderr, revision)


def test_doctor_reports_it_as_the_one_error_of_the_database(old_database: str, revision: str) -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"], catch_exceptions=False)
    assert done.exit_code == 1
    [finding] = [one for one in json.loads(done.stdout)["findings"] if one["check"] in ("schema", "database")]
    assert finding["level"] == "error"
    assert_tells(f"{finding['what']} {finding['remedy']}", revision)


def test_the_gate_refuses_it(old_database: str, revision: str) -> None:
    with pytest.raises(OldLayoutError) as refused:
        answer.apply(kwargs={"user_id": 2}).get()
    assert_tells(str(refused.value), revision)
    with pytest.raises(OldLayoutError):
        check_tokens_for_function(2, estimated_tokens=10, feature_name="Test")


def test_the_demo_names_the_folder_to_delete(old_database: str, revision: str, tmp_path: Path) -> None:
    with pytest.raises(TrueupError, match=rf"revision {revision}.*Delete {tmp_path}"):
        clear_tables(tmp_path)


def test_a_role_that_may_not_read_the_layout_can_connect(host: Host) -> None:
    """It may read the host's tables, and has no rights on trueup's."""
    url = host.engine.url
    role = f"looks_only_{url.database}"
    host.execute(NEWEST)
    host.execute(f"CREATE ROLE {role} LOGIN")
    for grant in ("SELECT ON ALL TABLES IN SCHEMA public", "USAGE ON SCHEMA trueup"):
        host.execute(f"GRANT {grant} TO {role}")
        engine = create_trueup_engine(
            get_settings().model_copy(update={"database_url": url.set(username=role).render_as_string(False)})
        )
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM public.billing_subscription")) == 0
        engine.dispose()
    host.execute(f"DROP OWNED BY {role}")
    host.execute(f"DROP ROLE {role}")
