"""The usage log's triggers: after any write by any role, the balance is the exact sum of the log."""

import contextlib
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.sessions import impatient, locked_balance
from tests.support.work import balance, hold_tokens
from trueup.accounts.account import read_account
from trueup.errors import TokensDenied

BEFORE_WINDOW = START - timedelta(days=1)


@pytest.fixture
def user(host: Host, connection: Connection) -> int:
    """A user with 1,000 of 10,000 tokens used and a balance built, so that later writes arrive as deltas."""
    user = host.subscriber(10_000)
    host.log(user, 1_000)
    hold_tokens(connection, user, 0, task="warm-up")
    assert balance(host, user) == (1_000, 0)
    return user


def consumed(host: Host, connection: Connection, user: int) -> int:
    """Return the consumed tokens by a read, after checking that folding gives the same and that the sums agree."""
    assert_true(host)
    read = read_account(connection, user).consumed
    with contextlib.suppress(TokensDenied):  # a denial folds deltas too
        hold_tokens(connection, user, 0)
    assert_true(host)
    assert balance(host, user)[0] == read
    assert host.value("SELECT count(*) FROM trueup.usage_delta WHERE user_id = :user", user=user) == 0
    return read


def test_an_inserted_row_counts(host: Host, connection: Connection, user: int) -> None:
    host.log(user, 250)
    assert consumed(host, connection, user) == 1_250


def test_one_statement_may_insert_rows_of_many_users(host: Host, connection: Connection, user: int) -> None:
    other = host.subscriber()
    host.execute(
        "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) "
        "SELECT u, 'chat', n, :at FROM unnest(ARRAY[:user, :other]::bigint[]) u, generate_series(1, 10) n",
        user=user,
        other=other,
        at=START,
    )
    assert consumed(host, connection, user) == 1_055
    assert consumed(host, connection, other) == 55


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ({"success": False}, 0),
        ({"success": None}, 0),
        ({"total_tokens": None}, 0),
        ({"total_tokens": 0}, 0),
        ({"total_tokens": -300}, -300),
        ({"created_at": None}, 0),
        ({"created_at": START}, 200),
        ({"created_at": START - timedelta(microseconds=1)}, 0),
        ({"created_at": "infinity"}, 200),
        ({"created_at": "-infinity"}, 0),
        ({"created_at": "2999-01-01"}, 200),
        ({"total_tokens": 2**31 - 1}, 2**31 - 1),
        ({"user_id": None}, 0),
    ],
)
def test_odd_rows_count_as_in_the_logs_own_sum(
    host: Host, connection: Connection, user: int, row: dict[str, Any], counts: int
) -> None:
    for column in ("success", "total_tokens", "created_at", "user_id"):
        host.execute(f"ALTER TABLE ai_usage_log ALTER {column} DROP NOT NULL")
    values = {"user_id": user, "success": True, "total_tokens": 200, "created_at": START, **row}
    log = host.value(
        "INSERT INTO ai_usage_log (user_id, section, success, total_tokens, created_at) VALUES "
        "(:user_id, 'chat', :success, :total_tokens, CAST(:created_at AS timestamptz)) RETURNING id",
        **values,
    )
    assert consumed(host, connection, user) == 1_000 + counts
    host.execute("UPDATE ai_usage_log SET section = 'other' WHERE id = :id", id=log)
    assert consumed(host, connection, user) == 1_000 + counts
    host.execute("DELETE FROM ai_usage_log WHERE id = :id", id=log)
    assert consumed(host, connection, user) == 1_000


@pytest.mark.parametrize(
    ("change", "total"),
    [
        ("total_tokens = 1700", 1_700),
        ("total_tokens = -1", -1),
        ("success = false", 0),
        ("created_at = '2024-10-01Z'", 0),
        ("created_at = '2024-12-01Z'", 1_000),
        ("section = 'other'", 1_000),
        ("total_tokens = 5, success = false", 0),
        ("total_tokens = 5, created_at = '2024-12-01Z'", 5),
    ],
)
def test_an_updated_row_counts_with_its_new_values(
    host: Host, connection: Connection, user: int, change: str, total: int
) -> None:
    host.execute(f"UPDATE ai_usage_log SET {change} WHERE user_id = :user", user=user)
    assert consumed(host, connection, user) == total


def test_a_row_that_becomes_a_success_or_moves_into_the_window_counts_from_then_on(
    host: Host, connection: Connection, user: int
) -> None:
    failed = host.log(user, 30, success=False)
    old = host.log(user, 4, at=BEFORE_WINDOW)
    assert consumed(host, connection, user) == 1_000
    host.execute("UPDATE ai_usage_log SET success = true WHERE id = :id", id=failed)
    host.execute("UPDATE ai_usage_log SET created_at = :at WHERE id = :id", id=old, at=START)
    assert consumed(host, connection, user) == 1_034


def test_a_row_given_to_another_user_moves_its_tokens(host: Host, connection: Connection, user: int) -> None:
    other = host.subscriber()
    hold_tokens(connection, other, 0)
    host.execute("UPDATE ai_usage_log SET user_id = :other WHERE user_id = :user", user=user, other=other)
    assert consumed(host, connection, user) == 0
    assert consumed(host, connection, other) == 1_000


def test_an_update_that_changes_no_sum_leaves_no_delta(host: Host, user: int) -> None:
    host.execute("UPDATE ai_usage_log SET model_name = 'x'")
    assert host.value("SELECT count(*) FROM trueup.usage_delta") == 0


def test_a_deleted_row_no_longer_counts(host: Host, connection: Connection, user: int) -> None:
    host.log(user, 7)
    host.execute("DELETE FROM ai_usage_log WHERE total_tokens = 1000")
    assert consumed(host, connection, user) == 7


def test_a_truncated_log_counts_nothing_and_later_rows_count(host: Host, connection: Connection, user: int) -> None:
    host.log(user, 5)
    host.execute("TRUNCATE ai_usage_log")
    host.log(user, 11)
    assert read_account(connection, user).consumed == 11
    assert consumed(host, connection, user) == 11


def test_copied_rows_count(host: Host, connection: Connection, user: int) -> None:
    raw = host.connection.connection.driver_connection
    assert raw is not None
    with (
        raw.cursor() as cursor,
        cursor.copy("COPY ai_usage_log (id, user_id, section, total_tokens, created_at) FROM STDIN") as copy,
    ):
        for tokens in (10, 20, 30):
            copy.write_row((uuid.uuid4(), user, "chat", tokens, START))
    assert consumed(host, connection, user) == 1_060


def test_an_upsert_counts_its_inserts_and_its_updates(host: Host, connection: Connection, user: int) -> None:
    there = host.log(user, 100)
    host.execute(
        "INSERT INTO ai_usage_log (id, user_id, section, total_tokens, created_at) "
        "VALUES (:there, :user, 'chat', 900, :at), (gen_random_uuid(), :user, 'chat', 5, :at) "
        "ON CONFLICT (id) DO UPDATE SET total_tokens = excluded.total_tokens",
        there=there,
        user=user,
        at=START,
    )
    assert consumed(host, connection, user) == 1_905


def test_a_merge_counts_all_it_does(host: Host, connection: Connection, user: int) -> None:
    if int(host.value("SHOW server_version_num")) < 150_000:
        pytest.skip("this PostgreSQL has no MERGE")
    kept, gone = host.log(user, 100), host.log(user, 50)
    host.execute(
        "MERGE INTO ai_usage_log l USING (VALUES (CAST(:kept AS uuid), 1), (CAST(:gone AS uuid), 0), "
        "(gen_random_uuid(), 7)) AS v (id, tokens) ON l.id = v.id "
        "WHEN MATCHED AND v.tokens = 0 THEN DELETE WHEN MATCHED THEN UPDATE SET total_tokens = v.tokens "
        "WHEN NOT MATCHED THEN INSERT (id, user_id, section, total_tokens, created_at) "
        "VALUES (v.id, :user, 'chat', v.tokens, :at)",
        kept=kept,
        gone=gone,
        user=user,
        at=START,
    )
    assert consumed(host, connection, user) == 1_008


def test_rows_deleted_by_a_cascade_no_longer_count(host: Host, connection: Connection, user: int) -> None:
    host.execute(
        "ALTER TABLE ai_usage_log ADD FOREIGN KEY (user_id) REFERENCES accounts_user (id) ON DELETE CASCADE; "
        "ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_fkey; "
        "ALTER TABLE ai_usage_log DROP CONSTRAINT ai_usage_log_user_id_fkey"
    )
    host.execute("DELETE FROM accounts_user WHERE id = :user", user=user)
    assert host.used(user) == 0
    assert consumed(host, connection, user) == 0


def test_a_rolled_back_write_leaves_nothing(host: Host, connection: Connection, user: int) -> None:
    with host.engine.connect() as session:
        session.execute(text("UPDATE ai_usage_log SET total_tokens = 77"))
        session.execute(text("SAVEPOINT s"))
        session.execute(text("DELETE FROM ai_usage_log"))
        session.execute(text("ROLLBACK TO s"))
        session.rollback()
    assert host.value("SELECT count(*) FROM trueup.usage_delta") == 0
    assert consumed(host, connection, user) == 1_000


def test_a_rolled_back_truncate_leaves_nothing(host: Host, connection: Connection, user: int) -> None:
    with host.engine.connect() as session:
        session.execute(text("TRUNCATE ai_usage_log"))
        session.rollback()
    assert consumed(host, connection, user) == 1_000


@pytest.fixture
def plain_role(host: Host) -> Iterator[Connection]:
    """A session of a role with rights on the host's tables and none on schema trueup."""
    role = f"app_{uuid.uuid4().hex[:8]}"
    host.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ai_usage_log TO {role}")
    engine = create_engine(make_url(str(host.engine.url)).set(username=role), poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection
    engine.dispose()
    host.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_without_rights_on_our_schema_can_write_the_log(
    host: Host, connection: Connection, user: int, plain_role: Connection
) -> None:
    with pytest.raises(Exception, match="permission denied for schema trueup"):
        plain_role.execute(text("SELECT * FROM trueup.balance"))
    insert = text("INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) VALUES (:u, 'chat', 9, :at)")
    plain_role.execute(insert, {"u": user, "at": START})
    plain_role.execute(text("UPDATE ai_usage_log SET total_tokens = 10 WHERE total_tokens = 9"))
    plain_role.execute(text("DELETE FROM ai_usage_log WHERE total_tokens = 1000"))
    assert consumed(host, connection, user) == 10
    plain_role.execute(text("TRUNCATE ai_usage_log"))
    assert consumed(host, connection, user) == 0


def test_a_host_writes_the_log_while_the_users_balance_is_locked(host: Host, connection: Connection, user: int) -> None:
    with locked_balance(host, user), impatient(host) as session:
        session.execute(
            text("INSERT INTO ai_usage_log (user_id, section, total_tokens) VALUES (:user, 'chat', 40)"),
            {"user": user},
        )
        session.execute(text("UPDATE ai_usage_log SET total_tokens = 60 WHERE total_tokens = 40"))
        session.execute(text("DELETE FROM ai_usage_log WHERE total_tokens = 1000"))
        assert_true(host)
    assert consumed(host, connection, user) == 60


def test_our_gate_does_not_wait_for_a_host_that_writes_the_log(host: Host, connection: Connection, user: int) -> None:
    with host.engine.connect() as session:
        session.execute(text("UPDATE ai_usage_log SET total_tokens = 9000 WHERE user_id = :user"), {"user": user})
        connection.execute(text("SET lock_timeout = '100ms'"))
        assert hold_tokens(connection, user, 9_000).tokens_left == 9_000  # the host's row is not committed yet
        session.commit()
    assert read_account(connection, user).consumed == 9_000
    assert_true(host)
