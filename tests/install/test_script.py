"""`trueup db attach --dry-run` prints SQL that attaches trueup in psql; printing changes nothing."""

import subprocess

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true
from tests.support.dumps import pg_dump, programs
from tests.support.host import Host
from tests.support.sessions import locked
from tests.support.work import hold_tokens
from trueup.database.engine import transaction
from trueup.errors import NotInstalledError
from trueup.host.fields import SubscriptionTable, UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach, attach_script
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import check_installed

MAPPING = HostMapping()
ODD = HostMapping(
    usage_log=UsageLogTable(table='Log: "ai" 100%s', total_tokens="it's :tokens"),
    subscription=SubscriptionTable(start_date="Began %(at)s"),
)


@pytest.fixture
def host(bare_host: Host) -> Host:
    return bare_host


def psql(host: Host, script: str) -> subprocess.CompletedProcess[str]:
    url = make_url(str(host.engine.url)).set(drivername="postgresql").render_as_string(hide_password=False)
    command = [programs() / "psql", "--no-psqlrc", "--quiet", "--tuples-only", url]
    return subprocess.run(command, input=script, capture_output=True, text=True, check=False)


def run(host: Host, script: str) -> None:
    done = psql(host, script)
    assert (done.returncode, done.stderr) == (0, "")


def printed(mapping: HostMapping = MAPPING) -> str:
    with transaction() as connection:
        return attach_script(connection, mapping)


def drop_schema(host: Host) -> None:
    host.execute("DROP SCHEMA trueup CASCADE")


def test_the_script_has_every_step_and_printing_changes_nothing(host: Host, empty_database: str) -> None:
    host.log(host.subscriber(), 100)
    before = pg_dump(empty_database)
    script = printed()
    assert pg_dump(empty_database) == before
    assert script.index("CREATE SCHEMA trueup") < script.index("CREATE TABLE trueup.balance")
    assert script.index("CREATE OR REPLACE TRIGGER trueup_inserted") < script.index("FROM trueup.fill_balances(")
    assert script.index("FROM trueup.fill_balances(") < script.index("FUNCTION trueup.open_hold(")


def test_the_script_creates_the_same_objects_as_attach(host: Host, empty_database: str, connection: Connection) -> None:
    users = [host.subscriber(), host.subscriber()]
    host.log(users[0], 100)
    run(host, printed())
    assert_true(host)
    scripted = pg_dump(empty_database, "--schema-only")
    assert host.execute("SELECT user_id, consumed FROM trueup.balance ORDER BY 1").all() == [
        (users[0], 100),
        (users[1], 0),
    ]
    check_installed(connection)
    hold_tokens(connection, users[0], 9_900)
    drop_schema(host)
    attach(MAPPING)
    assert pg_dump(empty_database, "--schema-only") == scripted


def test_names_of_any_kind_work_in_psql(empty_database: str) -> None:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        build_host_metadata(ODD).create_all(connection)
    with Host(engine) as host:
        run(host, printed(ODD))
        scripted = pg_dump(empty_database, "--schema-only")
        mapped = host.value("SELECT mapping FROM trueup.installation")
        drop_schema(host)
        attach(ODD)
        assert pg_dump(empty_database, "--schema-only") == scripted
        assert host.value("SELECT mapping FROM trueup.installation") == mapped
    engine.dispose()


def test_a_script_stopped_by_a_lock_may_be_run_again(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    host.log(user, 100)
    script = printed()
    with locked(host, "LOCK TABLE ai_usage_log IN ROW EXCLUSIVE MODE"):
        done = psql(host, script)
        assert done.returncode == 3
        assert "canceling statement due to lock timeout" in done.stderr
    with pytest.raises(NotInstalledError, match="interrupted"):
        check_installed(connection)
    run(host, printed())
    host.log(user, 20)
    hold_tokens(connection, user, 9_880)
    assert_true(host)


def test_for_a_complete_setup_the_script_locks_no_host_table(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    attach(MAPPING)
    host.log(user, 20)
    script = printed()
    assert "CREATE OR REPLACE TRIGGER" not in script
    assert "CREATE TABLE" not in script
    with locked(host, "LOCK TABLE ai_usage_log, billing_subscription IN ROW EXCLUSIVE MODE"):
        run(host, script)
    hold_tokens(connection, user, 9_980)


@pytest.mark.parametrize(
    ("meanwhile", "refusal"),
    [
        ("UPDATE trueup.balance SET consumed = 1", "do not agree with the log: the gate stays closed"),
        ("ALTER TABLE public.ai_usage_log DISABLE TRIGGER trueup_deleted", "trigger trueup_deleted is disabled"),
    ],
)
def test_wrong_balances_or_triggers_keep_the_gate_closed(
    host: Host, connection: Connection, meanwhile: str, refusal: str
) -> None:
    host.log(host.subscriber(), 100)
    done = psql(host, printed().replace("-- 4.", f"{meanwhile};\n-- 4."))
    assert done.returncode == 3
    assert refusal in done.stderr
    with pytest.raises(NotInstalledError, match="interrupted"):
        check_installed(connection)


def test_a_host_that_does_not_fit_is_refused(host: Host) -> None:
    with pytest.raises(NotInstalledError, match=r"no table gone\. Nothing was changed"):
        printed(HostMapping(usage_log=UsageLogTable(table="gone")))
