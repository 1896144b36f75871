"""The whole way through on every version of PostgreSQL that this machine has beside the embedded one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup, trueup_json
from tests.conftest import cloned_database, settings_for
from tests.stack.helpers import temporary_home
from tests.support.books import assert_true
from tests.support.host import Host, pooled_engine
from tests.support.postgres_versions import VARIABLE, installed_versions, running_server
from tests.support.standby import caught_up, standby_of
from tests.support.two_books import MAPPED
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect
from trueup.doctor.database import examine_database
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.preview.scan import scan
from trueup.reconcile.runs import Finding
from trueup.settings.settings import get_settings
from trueup.stack import StackUrls

OTHERS = (14, 15, 16, 17)


@pytest.fixture(scope="module", params=OTHERS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of that version. Gives the URL of its first database."""
    programs = installed_versions().get(request.param)
    if programs is None:
        remedy = f"`python -m tests.versions` or {VARIABLE} brings it"
        pytest.skip(f"NOT TESTED: no PostgreSQL {request.param} here; {remedy}")
    with temporary_home() as home, running_server(programs, home) as url:
        engine = pooled_engine(url)
        with engine.connect() as connection:
            assert connection.execute(text("SHOW server_version")).scalar_one().startswith(str(request.param))
        engine.dispose()
        yield url


@pytest.fixture
def url(server: str, stack: StackUrls) -> Iterator[str]:
    """The URL of an empty database on that server."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with cloned_database(replace(stack, database_url=server), admin, "template1") as url:
        yield url
    admin.dispose()


@pytest.fixture
def host(
    url: str, stack: StackUrls, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A host on that server, set up."""
    with settings_for(url, stack, monkeypatch, tmp_path_factory.mktemp("version")):
        engine = pooled_engine(url)
        with engine.begin() as connection:
            install(connection, get_settings().host, with_host_tables=True)
        with Host(engine) as host:
            yield host
        engine.dispose()


def test_the_gate_charges_reconciling_and_the_doctor_work(host: Host) -> None:
    user, missed = host.subscriber(1_000), host.subscriber(1_000)
    host.log(user, 100)
    host.log(missed, 300)
    with connect() as connection:
        hold = hold_tokens(connection, user, 600)
        with pytest.raises(TokensDenied, match="insufficient_tokens"):
            hold_tokens(connection, user, 400)
        charge_tokens(connection, hold, 250)
        assert close_hold(connection, hold, completed=True) == "settled"
    assert trueup_json("reconcile", "--deep")["drifted"] == 2
    assert (host.counter(user), host.counter(missed)) == (650, 700)
    trueup("tokens", "grant", user, 50, "--reason", "gift", "--reference", "r1")
    assert_true(host)
    told = [finding for finding in examine_database(get_settings()) if finding.level != "ok"]
    assert {finding.check for finding in told} == {"rights"}  # the tests' role is a superuser


def test_a_host_can_be_looked_at_before_anything_is_set_up(host: Host) -> None:
    """There our functions are parts of one statement, in which older versions want a name for each of them."""
    user = host.subscriber(1_000)
    host.log(user, 300)
    host.execute("DROP SCHEMA trueup CASCADE")
    build_host_metadata(MAPPED).create_all(host.engine)
    for mapping in (HostMapping(), MAPPED):
        assert seen(host.engine, mapping) == [(1_000, 700)]


def test_so_can_a_hot_standby_of_one(host: Host) -> None:
    user = host.subscriber(1_000)
    host.execute("DROP SCHEMA trueup CASCADE")
    with standby_of(host.engine) as standby:
        host.log(user, 300)
        wait_for(lambda: caught_up(host.engine, standby), "the standby to have the newest row")
        assert seen(standby, HostMapping()) == [(1_000, 700)]


def seen(engine: Engine, mapping: HostMapping) -> list[tuple[int | None, int]]:
    """Return what a look reports: the counters that are wrong, each with what it should be."""
    found: list[Finding] = []
    scan(engine, mapping, lambda checked, findings: found.extend(findings))
    return [(one.drift.observed, one.drift.expected) for one in found]
