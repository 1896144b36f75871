"""Sessions behind a transaction pooler, tested on a direct connection, and the state that they leave on it."""

import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from tests.hosts.documents import ROOT
from tests.hosts.running import plain_url
from tests.support.host import Host
from trueup.database.session import limit_session, limit_transactions

LIMITS = {"timezone": "UTC", "statement_timeout": "7s", "work_mem": "5MB"}


@pytest.fixture
def lent(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(plain_url(database), options="-c timezone=Asia/Tokyo") as connection:
        limit_transactions(connection, LIMITS)
        yield connection


# State that would stay with a session: locks, settings, and notification channels.
OF_A_SESSION = re.compile(
    r"\bpg_(?:try_)?advisory_lock|\bLISTEN\b|\bNOTIFY\b|\bset_config\([^()]*, false\)"
    r"|text\(f?\"SET (?!LOCAL|TRANSACTION|CONSTRAINTS)"
)


def test_no_other_code_of_trueup_uses_session_state() -> None:
    packages = (ROOT / package for package in ("trueup", "cli", "tasks", "worker"))
    sources = [path for package in packages for path in package.rglob("*") if path.suffix in (".py", ".sql")]
    found = [path.name for path in sources if OF_A_SESSION.search(path.read_text())]
    assert found == ["session.py"]


def shown(connection: psycopg.Connection, name: str = "statement_timeout") -> object:
    row = connection.execute(f"SHOW {name}").fetchone()
    assert row is not None
    return row[0]


def left_behind(connection: psycopg.Connection) -> list[object]:
    """Return the settings that the next client would find."""
    with psycopg.Cursor(connection) as plain:
        found = [plain.execute(f"SHOW {name}").fetchone() for name in LIMITS]
        assert connection.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.INTRANS)
    connection.rollback()
    return [row[0] for row in found if row]


def test_a_direct_session_sets_its_limits_once(database: str) -> None:
    with psycopg.connect(plain_url(database)) as connection:
        limit_session(connection, LIMITS)
        assert (connection.autocommit, connection.prepare_threshold) == (False, 5)
        assert left_behind(connection) == ["UTC", "7s", "5MB"]


@pytest.mark.parametrize("autocommit", [True, False])
def test_each_transaction_has_the_limits_and_leaves_nothing_behind(lent: psycopg.Connection, autocommit: bool) -> None:
    lent.autocommit = autocommit
    for _ in range(10):
        assert [shown(lent, name) for name in LIMITS] == ["UTC", "7s", "5MB"]
        assert shown(lent, "transaction_isolation") == "read committed"
    lent.rollback()
    assert left_behind(lent) == ["Asia/Tokyo", "0", "4MB"]
    prepared = lent.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
    assert prepared == (0,)


def test_with_autocommit_each_statement_is_its_own_transaction(lent: psycopg.Connection, host: Host) -> None:
    lent.autocommit = True
    lent.execute("INSERT INTO accounts_user VALUES (1, 'a', '')")
    assert host.value("SELECT count(*) FROM accounts_user") == 1
    assert lent.execute("SELECT id FROM accounts_user WHERE id = %s", [1]).fetchall() == [(1,)]
    with pytest.raises(psycopg.errors.UniqueViolation):
        lent.execute("INSERT INTO accounts_user VALUES (2, 'b', ''), (1, 'a', '')")
    assert lent.info.transaction_status == TransactionStatus.IDLE
    assert host.value("SELECT count(*) FROM accounts_user") == 1
    assert shown(lent) == "7s"


def test_read_committed_whatever_the_database_says(lent: psycopg.Connection, host: Host) -> None:
    host.execute("SELECT 1")
    lent.autocommit = True
    with psycopg.Cursor(lent) as plain:
        plain.execute("SET default_transaction_isolation = 'serializable'")
    assert shown(lent, "transaction_isolation") == "read committed"


def test_a_statement_that_takes_too_long_is_cancelled(lent: psycopg.Connection) -> None:
    limit_transactions(lent, {"statement_timeout": "50ms"})
    for lent.autocommit in (True, False):
        with pytest.raises(psycopg.errors.QueryCanceled):
            lent.execute("SELECT pg_sleep(10)")
        lent.rollback()


def test_server_side_cursors_are_limited_too(lent: psycopg.Connection) -> None:
    with lent.cursor("bits") as bits:
        bits.execute("SELECT current_setting('statement_timeout') FROM generate_series(1, 3)")
        assert bits.fetchmany(2) == [("7s",), ("7s",)]
    lent.rollback()
    with lent.cursor() as many:
        statement = "INSERT INTO accounts_user VALUES (%s, gen_random_uuid(), current_setting('statement_timeout'))"
        many.executemany(statement, [(1,), (2,)])
    assert lent.execute("SELECT DISTINCT email FROM accounts_user").fetchall() == [("7s",)]
    lent.rollback()


def test_a_lost_connection_raises_its_own_error(lent: psycopg.Connection, host: Host) -> None:
    lent.autocommit = True
    host.execute("SELECT pg_terminate_backend(:pid)", pid=lent.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        lent.execute("SELECT 1")
    assert lent.closed
