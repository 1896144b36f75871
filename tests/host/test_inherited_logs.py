"""Tables that inherit from the usage log, at any depth: their rows are part of the log while they inherit."""

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.partitioned import known
from tests.support.work import hold_tokens
from trueup.database.retry import retrying
from trueup.host.mapping import HostMapping
from trueup.host.partitions import uncovered_partitions
from trueup.install.attach import attach

EPOCH = "SELECT trueup.log_epoch()"


@pytest.fixture
def user(host: Host, connection: Connection) -> int:
    """Return a user with 100 used tokens and a balance. A table inherits from the log."""
    user = host.subscriber()
    host.log(user, 100)
    host.execute("CREATE TABLE child () INHERITS (ai_usage_log)")
    retrying(lambda worker: hold_tokens(worker, user, 0))
    return user


def add_rows(host: Host, table: str) -> None:
    """Create a table like the log with a row of 900 tokens, which inherits from a table below the log."""
    host.execute("CREATE TABLE more (LIKE ai_usage_log INCLUDING ALL)")
    host.execute(
        "INSERT INTO more (user_id, section, total_tokens, created_at) "
        "SELECT user_id, section, 900, created_at FROM ONLY ai_usage_log"
    )
    host.execute(f"ALTER TABLE more INHERIT {table}")


def test_rows_of_a_new_table_two_levels_below_the_log_count_at_the_next_gate(host: Host, user: int) -> None:
    add_rows(host, "child")
    assert known(user) == host.used(user) == 1_000


def test_a_log_that_is_renamed_for_a_moment_keeps_the_baseline_of_the_tables_below_it(host: Host, user: int) -> None:
    epoch = host.value(EPOCH)
    host.execute("ALTER TABLE ai_usage_log RENAME TO away")
    host.execute("SELECT trueup.record_log_state()")
    host.execute("ALTER TABLE away RENAME TO ai_usage_log")
    assert (known(user), host.value(EPOCH)) == (100, epoch)
    add_rows(host, "ai_usage_log")
    assert known(user) == host.used(user) == 1_000


def test_a_foreign_table_is_treated_as_a_table_with_rows(host: Host, user: int) -> None:
    epoch = host.value(EPOCH)
    host.execute("CREATE FOREIGN DATA WRAPPER away; CREATE SERVER away FOREIGN DATA WRAPPER away")
    host.execute("CREATE FOREIGN TABLE far () INHERITS (ai_usage_log) SERVER away")
    host.execute("SELECT trueup.record_log_state()")
    assert host.value(EPOCH) > epoch


def test_changes_of_a_table_that_no_longer_inherits_do_not_count(host: Host, user: int) -> None:
    host.execute(
        "INSERT INTO child (user_id, section, total_tokens, created_at) "
        "SELECT user_id, section, 900, created_at FROM ONLY ai_usage_log"
    )
    attach(HostMapping())
    host.execute("UPDATE child SET total_tokens = 800")
    assert known(user) == host.used(user) == 900
    host.execute("ALTER TABLE child NO INHERIT ai_usage_log")
    host.execute("INSERT INTO trueup.log_truncation DEFAULT VALUES")  # makes all balances stale
    retrying(lambda worker: hold_tokens(worker, user, 0))
    host.execute("UPDATE child SET total_tokens = 700")
    host.execute("INSERT INTO child SELECT * FROM child")
    host.execute("DELETE FROM child")
    assert known(user) == host.used(user) == 100
    assert_true(host)


def test_triggers_of_an_older_version_are_replaced_on_tables_that_inherit(
    host: Host, connection: Connection, user: int
) -> None:
    attach(HostMapping())
    host.execute(
        "CREATE OR REPLACE TRIGGER trueup_deleted AFTER DELETE ON child REFERENCING OLD TABLE AS old_rows "
        "FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_deleted()"
    )
    assert uncovered_partitions(connection) == ["public.child"]
    attach(HostMapping())
    assert uncovered_partitions(connection) == []
    assert known(user) == 100
