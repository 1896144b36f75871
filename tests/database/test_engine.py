import os
from contextlib import suppress
from datetime import timedelta

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, text

from tests.support.host import START, Host
from tests.support.sessions import locked
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect, dispose_engine, transaction
from trueup.database.retry import retrying
from trueup.database.session import session_settings
from trueup.errors import NotInstalledError, ServiceUnavailableError
from trueup.settings.settings import get_settings
from trueup.usage.charges import find_answer


def one(statement: str) -> object:
    with connect() as connection:
        return connection.execute(text(statement)).scalar_one()


def test_sessions_are_in_utc_read_committed_and_bounded_in_time(database: str) -> None:
    assert one("SHOW timezone") == "UTC"
    assert one("SHOW transaction_isolation") == "read committed"
    assert one("SHOW statement_timeout") == "30s"
    assert one("SHOW idle_in_transaction_session_timeout") == "30s"
    assert one("SHOW application_name") == "trueup"


def test_options_of_the_url_are_kept_but_for_what_trueup_sets(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "-csearch_path%3Dapp%20-cwork_mem%3D5MB"
    monkeypatch.setenv("TRUEUP_DATABASE_URL", f"{database}&client_encoding=latin1&options={options}")
    get_settings.cache_clear()
    dispose_engine()
    assert (one("SHOW work_mem"), one("SHOW search_path")) == ("5MB", "pg_catalog, pg_temp")
    assert (one("SHOW timezone"), one("SHOW client_encoding")) == ("UTC", "UTF8")


# What a role, a database or a server may set, and what trueup's sessions must not take over.
HOSTILE_SETTINGS = {
    "client_encoding": "LATIN1",
    "datestyle": "German, DMY",
    "intervalstyle": "sql_standard",
    "extra_float_digits": "-10",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "lock_timeout": "'1ms'",
    "timezone": "'Asia/Tokyo'",
    "default_transaction_isolation": "serializable",
    "search_path": "nowhere",
    "statement_timeout": "'2s'",
    "idle_in_transaction_session_timeout": "'1s'",
    "idle_session_timeout": "'1s'",
    "transaction_timeout": "'1s'",
    "row_security": "on",
}


@pytest.mark.parametrize("by", ["role", "database"])
def test_settings_of_a_role_or_a_database_change_nothing_for_trueup(
    database: str, host: Host, admin_engine: Engine, by: str
) -> None:
    known = set(host.execute("SELECT lower(name) FROM pg_settings").scalars())
    chosen = {name: value for name, value in HOSTILE_SETTINGS.items() if name in known}
    here = host.value("SELECT quote_ident(current_database())")
    whom = (
        f"ROLE {host.value('SELECT quote_ident(current_user)')} IN DATABASE {here}"
        if by == "role"
        else f"DATABASE {here}"
    )
    user = host.subscriber(10_000)
    with admin_engine.connect() as admin:
        for name, value in chosen.items():
            admin.execute(text(f"ALTER {whom} SET {name} = {value}"))
    dispose_engine()
    with connect() as connection:
        for name, value in session_settings(connection.connection.driver_connection.info.server_version, "30s").items():
            assert connection.scalar(text(f"SHOW {name}")) == value, name
        hold = hold_tokens(connection, user, 1_000, lease=60, now=START)
        assert hold.expires_at == START + timedelta(seconds=600)
        charge_tokens(connection, hold, 60, answer={"text": "سلام"}, metadata={"path": "C:\\new"})
        assert find_answer(connection, hold, "1") == {"text": "سلام"}
    assert set(session_settings(999999, "30s")) == set(HOSTILE_SETTINGS)


def test_on_connect_each_statement_is_its_own_transaction(host: Host) -> None:
    with connect() as connection:
        connection.execute(text("INSERT INTO public.accounts_user VALUES (1, 'a', '')"))
        assert host.value("SELECT count(*) FROM accounts_user") == 1


@pytest.mark.parametrize("statement", ["SELECT 1", "SELECT 1 / 0"])
@pytest.mark.parametrize("autocommit", [True, False])
def test_a_connection_returns_to_the_pool_without_a_transaction(host: Host, autocommit: bool, statement: str) -> None:
    host.user()
    with connect() as connection:
        lent = connection.connection.dbapi_connection
        assert isinstance(lent, psycopg.Connection)
        lent.autocommit = autocommit
        lent.execute("BEGIN" if autocommit else "SELECT 1")
        lent.execute("UPDATE public.accounts_user SET email = 'never committed'")
        with suppress(psycopg.errors.DivisionByZero):
            lent.execute(statement)
    assert (lent.info.transaction_status, lent.autocommit) == (TransactionStatus.IDLE, False)
    with transaction() as connection:
        assert connection.connection.dbapi_connection is lent
        connection.execute(text("SELECT 1"))
    assert host.value("SELECT email FROM public.accounts_user") != "never committed"


def test_a_connection_that_was_lost_in_a_block_is_not_lent_again(host: Host) -> None:
    with connect() as connection:
        lost = connection.connection.dbapi_connection
        assert isinstance(lost, psycopg.Connection)
        lost.execute("BEGIN")
        pid = lost.info.backend_pid
        host.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
        wait_for(lambda: host.value("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid", pid=pid) == 0)
    with connect() as connection:
        assert connection.connection.dbapi_connection is not lost
        assert connection.execute(text("SELECT 1")).scalar_one() == 1


def test_a_transaction_is_committed_at_its_end_and_rolled_back_on_an_error(host: Host) -> None:
    with pytest.raises(ServiceUnavailableError), transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO public.accounts_user VALUES (1, 'a', ''); DO $$ BEGIN RAISE disk_full; END $$"
        )
    assert host.value("SELECT count(*) FROM accounts_user") == 0
    with transaction() as connection:
        connection.execute(text("INSERT INTO public.accounts_user VALUES (1, 'a', '')"))
        assert host.value("SELECT count(*) FROM accounts_user") == 0
    assert host.value("SELECT count(*) FROM accounts_user") == 1


@pytest.mark.parametrize(
    ("setting", "trouble"),
    [
        ("lock_timeout = '50ms'", "SELECT * FROM public.accounts_user"),
        ("statement_timeout = '50ms'", "SELECT * FROM public.accounts_user"),
        ("default_transaction_read_only = on", "CREATE TABLE public.on_a_standby ()"),
        ("lock_timeout = '50ms'", "SELECT pg_terminate_backend(pg_backend_pid())"),
        ("lock_timeout = '50ms'", "DO $$ BEGIN RAISE deadlock_detected; END $$"),
        ("lock_timeout = '50ms'", "DO $$ BEGIN RAISE disk_full; END $$"),
    ],
)
def test_a_transient_error_is_reported_as_an_unavailable_service(host: Host, setting: str, trouble: str) -> None:
    def run() -> None:
        with connect() as connection:
            connection.exec_driver_sql(f"SET {setting}")
            connection.exec_driver_sql(trouble)

    with (
        locked(host, "LOCK TABLE accounts_user IN ACCESS EXCLUSIVE MODE"),
        pytest.raises(ServiceUnavailableError, match=r"PostgreSQL at .* does not answer"),
    ):
        run()


@pytest.mark.parametrize(
    "statement", ["SELECT * FROM nothing", "SELECT trueup.nothing()", "SELECT nothing FROM trueup.balance"]
)
def test_the_error_for_a_missing_object_names_the_setup_command(database: str, statement: str) -> None:
    with pytest.raises(NotInstalledError, match="trueup db attach"):
        one(statement)


def test_the_error_for_an_exhausted_pool_names_the_setting(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_POOL_SIZE", "2")
    monkeypatch.setenv("TRUEUP_DATABASE_CONNECT_TIMEOUT_SECONDS", "1")
    get_settings.cache_clear()
    dispose_engine()
    with connect(), connect(), pytest.raises(ServiceUnavailableError, match="TRUEUP_DATABASE_POOL_SIZE"):
        one("SELECT 1")


def test_an_operation_is_retried_after_a_dead_connection_and_after_no_other_error(host: Host) -> None:
    one("SELECT 1")
    host.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trueup'")
    wait_for(lambda: host.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trueup'") == 0)
    calls = []
    with pytest.raises(ServiceUnavailableError):
        one("SELECT 1")
    host.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trueup'")
    assert retrying(lambda c: (calls.append(1), c.execute(text("SELECT 7")).scalar_one())[1]) == 7
    calls.clear()
    with pytest.raises(ServiceUnavailableError):
        retrying(lambda c: (calls.append(1), c.exec_driver_sql("DO $$ BEGIN RAISE disk_full; END $$")))
    assert len(calls) == 1


# The threads are of tests before this one.
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_connections_of_its_own(database: str) -> None:
    parent = one("SELECT pg_backend_pid()")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(one("SELECT pg_backend_pid()")).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert int(answer.read()) != parent
    os.waitpid(child, 0)
    assert one("SELECT pg_backend_pid()") == parent
