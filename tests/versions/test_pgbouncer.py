"""All of trueup through a real PgBouncer in transaction mode, as it comes: two sessions for everybody."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from tests.cli.conftest import settings, trueup, trueup_json
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.model_tasks import spend
from tests.support.pgbouncer import VARIABLE, find_pgbouncer, running_pgbouncer
from tests.support.waiting import DEADLINE_SECONDS
from tests.support.work import charge_tokens, hold_tokens
from tests.support.worker import own_application, running_worker
from tests.worker.conftest import TASKS
from trueup.database.engine import connect, dispose_engine, transaction
from trueup.errors import ServiceUnavailableError, TokensDenied
from trueup.gate.holds import close_hold
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.settings.settings import get_settings
from trueup.stack import StackUrls

__all__ = ["settings"]

SESSIONS = 2
CALLS = 8  # more than psycopg sees before it prepares a statement

Set = Callable[..., None]


@pytest.fixture(scope="module")
def server(stack: StackUrls) -> Iterator[str]:
    """A PgBouncer. Gives a URL that leads through it."""
    program = find_pgbouncer()
    if program is None:
        pytest.skip(f"NOT TESTED: no PgBouncer here; `apt-get install pgbouncer` or {VARIABLE} brings it")
    assert stack.database_url is not None
    user = make_url(stack.database_url).username or "postgres"
    with running_pgbouncer(program, stack.database_url, users=[user], pool_size=SESSIONS) as url:
        yield url


def through(server: str, database: str) -> str:
    return make_url(server).set(database=make_url(database).database).render_as_string(hide_password=False)


@pytest.fixture
def pooled(server: str, database: str, settings: Set) -> Iterator[str]:
    """This process's settings lead through PgBouncer to a database that is set up."""
    settings(TRUEUP_DATABASE_URL=through(server, database))
    dispose_engine()
    yield through(server, database)
    dispose_engine()


def test_statements_are_limited_and_nothing_is_left_to_the_next_one(pooled: str, settings: Set) -> None:
    settings(TRUEUP_STATEMENT_TIMEOUT_SECONDS="1")
    shown = "SELECT current_setting('statement_timeout'), current_setting('timezone')"
    for opened in (connect, transaction):
        for _ in range(CALLS):
            with opened() as connection:
                assert tuple(connection.execute(text(shown)).one()) == ("1s", "UTC")
    with pytest.raises(ServiceUnavailableError, match="statement timeout"), connect() as connection:
        connection.execute(text("SELECT pg_sleep(20)"))
    others = create_engine(pooled, poolclass=NullPool)
    for _ in range(CALLS):
        with others.connect() as connection:
            assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "0"
            assert connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
            connection.rollback()


def test_workers_at_once_hold_charge_and_settle(pooled: str, host: Host) -> None:
    users = [host.subscriber(10_000) for _ in range(3)]

    def work(number: int) -> None:
        for _ in range(CALLS):
            with connect() as connection:
                hold = hold_tokens(connection, users[number % 3], 100)
                charge_tokens(connection, hold, 60)
                assert close_hold(connection, hold, completed=True) == "settled"

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(work, range(6)))
    assert [host.counter(user) for user in users] == [10_000 - 2 * CALLS * 60] * 3
    with connect() as connection, pytest.raises(TokensDenied, match="insufficient_tokens"):
        hold_tokens(connection, users[0], 10_000)
    assert_true(host)


def test_attach_reconcile_report_and_detach(
    server: str, empty_database: str, settings: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    direct = create_engine(empty_database, poolclass=NullPool)
    with direct.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
    settings(TRUEUP_DATABASE_URL=through(server, empty_database))
    with Host(direct) as host:
        missed = [host.subscriber(1_000) for _ in range(20)]
        for user in missed:
            host.log(user, 300)
        trueup("db", "discover", "--write")
        assert trueup_json("drift", "report", "--read-only")["drifted"] == len(missed)
        assert trueup("db", "attach", "--yes").stdout.endswith("ready.\n")
        assert trueup_json("reconcile")["corrected"] == len(missed)
        assert len(trueup_json("drift", "report", "--rows", "all")["rows"]) == len(missed)
        trueup("reconcile", "--deep")
        assert {host.counter(user) for user in missed} == {700}
        trueup("tokens", "grant", missed[0], 50, "--reason", "gift", "--reference", "r1")
        assert "CREATE ROLE" in trueup("db", "grants").stdout
        wrong = {found["check"] for found in trueup_json("doctor", code=1)["findings"] if found["level"] == "error"}
        assert wrong == {"workers"}
        assert_true(host)
        trueup("db", "detach", "--keep-history", tmp_path / "history.jsonl", "--yes")
        assert host.value("SELECT to_regnamespace('trueup') IS NULL")
    direct.dispose()


@pytest.fixture
def app() -> Celery:
    app = own_application()
    app.control.purge()
    return app


def test_a_worker_runs_and_denies(pooled: str, host: Host, app: Celery, tmp_path: Path) -> None:
    rich, spent = host.subscriber(10_000), host.subscriber(50)
    assert get_settings().database_url == pooled
    with running_worker(tmp_path / "worker.log", include=(TASKS,)):
        sent = [spend.delay(user_id=user) for user in [rich, spent] * 3]
        results = [one.get(timeout=DEADLINE_SECONDS, propagate=False) for one in sent]
    assert all(isinstance(result, TokensDenied) for result in results[1::2])
    assert host.counter(rich) == 10_000 - sum(results[::2]) < 10_000
    assert_true(host)
