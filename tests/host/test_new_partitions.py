"""Partitions that are attached, with or without rows, and detached: the gate detects them."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from tests.support.partitioned import DECEMBER, PartitionedHost, known, month, new_host
from tests.support.sessions import impatient, locked, run_at_once
from tests.support.work import hold_tokens
from trueup.database.engine import get_engine
from trueup.database.retry import retrying
from trueup.errors import TokensDenied
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile

EPOCH = "SELECT trueup.log_epoch()"


@pytest.fixture
def host(empty_database: str) -> Iterator[PartitionedHost]:
    with new_host(empty_database, HostMapping()) as host:
        host.set_up()
        yield host


@pytest.fixture
def user(host: PartitionedHost) -> int:
    """Return a user with 1,000 of 10,000 tokens used, and a balance."""
    user = host.subscriber(10_000)
    host.write(user, 1_000)
    retrying(lambda worker: hold_tokens(worker, user, 0))
    return user


def more_of(host: PartitionedHost, user: int, tokens: int, *, name: str = "more") -> None:
    """Create a table like the log with a row of December, which can become a partition of the log."""
    host.execute('DROP TABLE IF EXISTS "Log 12"')
    host.execute(f"CREATE TABLE {name} (LIKE ai_usage_log INCLUDING ALL)")
    host.write(user, tokens, into=name, at=DECEMBER)


def test_rows_of_an_attached_partition_count_at_the_next_gate(host: PartitionedHost, user: int) -> None:
    other = host.subscriber(10_000)
    retrying(lambda worker: hold_tokens(worker, other, 0))
    more_of(host, user, 8_500)
    host.execute(f"ALTER TABLE ai_usage_log ATTACH PARTITION more {month(12)}")
    host.write(other, 70, into="more", at=DECEMBER)  # bypasses the triggers, before any gate
    with pytest.raises(TokensDenied):
        retrying(lambda worker: hold_tokens(worker, user, 501))
    assert retrying(lambda worker: hold_tokens(worker, user, 500)).tokens_left == 500
    assert (known(user), known(other)) == (9_500, 70)
    epoch = host.value(EPOCH)
    host.write(user, 1, at=DECEMBER)
    assert (known(user), host.value(EPOCH)) == (9_501, epoch)


def test_a_partition_that_was_detached_and_attached_again_with_other_rows_is_detected(
    host: PartitionedHost, user: int
) -> None:
    assert known(user) == 1_000
    host.execute("ALTER TABLE log_11 DETACH PARTITION log_11a")
    host.write(user, 300, into="log_11a")
    host.execute("ALTER TABLE log_11 ATTACH PARTITION log_11a FOR VALUES FROM ('2024-11-01Z') TO ('2024-11-15Z')")
    assert known(user) == 1_300
    # A partition that is attached again with its own partitions, when all balances are up to date.
    retrying(lambda worker: hold_tokens(worker, user, 0))
    host.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_11")
    host.write(user, 5, into="log_11")
    host.execute(f"ALTER TABLE ai_usage_log ATTACH PARTITION log_11 {month(11)}")
    assert known(user) == 1_305
    # A partition that has lost all its rows in the meantime.
    retrying(lambda worker: hold_tokens(worker, user, 0))
    host.execute("ALTER TABLE log_11 DETACH PARTITION log_11a; TRUNCATE log_11a")
    host.execute("ALTER TABLE log_11 ATTACH PARTITION log_11a FOR VALUES FROM ('2024-11-01Z') TO ('2024-11-15Z')")
    assert known(user) == 0


def test_rows_written_to_a_partition_during_its_detachment_do_not_count(host: PartitionedHost, user: int) -> None:
    host.execute("DROP TABLE log_default")
    host.write(user, 5, at=DECEMBER)
    # The detachment stops while it waits for the reader: the partition is still attached, but no query reads its rows.
    with (
        locked(host, "LOCK TABLE ai_usage_log IN ACCESS SHARE MODE"),
        impatient(host) as detaching,
        pytest.raises(OperationalError, match="lock timeout"),
    ):
        detaching.execute(text('ALTER TABLE ai_usage_log DETACH PARTITION "Log 12" CONCURRENTLY'))
    assert host.value("SELECT count(*) FROM pg_inherits WHERE inhdetachpending") == 1
    retrying(lambda worker: hold_tokens(worker, user, 0))
    host.write(user, 50, into='"Log 12"', at=DECEMBER)
    assert known(user) == host.used(user) == 1_000
    host.execute('DELETE FROM "Log 12"')
    assert known(user) == 1_000


def test_a_partition_without_rows_makes_no_balance_stale(host: PartitionedHost, user: int) -> None:
    epoch = host.value(EPOCH)
    host.execute("CREATE TABLE log_25 PARTITION OF ai_usage_log FOR VALUES FROM ('2025-01-01Z') TO ('2025-02-01Z')")
    assert (known(user), host.value(EPOCH)) == (1_000, epoch)
    host.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_10; DROP TABLE log_10")
    assert (known(user), host.value(EPOCH)) == (1_000, epoch)
    host.write(user, 7, at=datetime(2025, 1, 5, tzinfo=UTC))
    assert (known(user), host.value(EPOCH)) == (1_007, epoch)


def test_a_locked_partition_is_treated_as_a_partition_with_rows(host: PartitionedHost, user: int) -> None:
    epoch = host.value(EPOCH)
    host.execute("CREATE TABLE log_25 PARTITION OF ai_usage_log FOR VALUES FROM ('2025-01-01Z') TO ('2025-02-01Z')")
    with locked(host, "LOCK TABLE ONLY log_25 IN ACCESS EXCLUSIVE MODE"):
        host.execute("SELECT trueup.record_log_state()")
    assert host.value(EPOCH) > epoch
    assert known(user) == 1_000


def test_concurrent_gates_count_a_new_partition_once(host: PartitionedHost, user: int) -> None:
    more_of(host, user, 8_000)
    host.execute(f"ALTER TABLE ai_usage_log ATTACH PARTITION more {month(12)}")
    epochs = host.value("SELECT count(*) FROM trueup.log_truncation")

    def hold() -> bool:
        try:
            retrying(lambda worker: hold_tokens(worker, user, 300))
        except TokensDenied:
            return False
        return True

    assert sum(run_at_once([hold] * 8)) == 3
    assert host.value("SELECT count(*) FROM trueup.log_truncation") == epochs + 1


def test_a_partition_that_is_attached_during_a_repeated_setup_is_counted(host: PartitionedHost, user: int) -> None:
    more_of(host, user, 400)
    host.execute("DROP TABLE log_11b")
    host.execute("UPDATE more SET created_at = '2024-11-20Z'")
    assert known(user) == 1_000
    with host.engine.begin() as setting_up:

        @event.listens_for(setting_up, "before_cursor_execute")
        def attach_it(connection: Connection, cursor: object, statement: str, *rest: object) -> None:
            if "TRIGGER trueup_window_changed" in statement:  # the setup has read the partitions by then
                host.execute(
                    "ALTER TABLE log_11 ATTACH PARTITION more FOR VALUES FROM ('2024-11-15Z') TO ('2024-12-01Z')"
                )

        install(setting_up, host.mapping, with_host_tables=False)
    assert known(user) == host.used(user) == 1_400


def test_a_quick_pass_counts_the_rows_of_a_new_partition_before_it_corrects(host: PartitionedHost, user: int) -> None:
    more_of(host, user, 400)
    host.execute(f"ALTER TABLE ai_usage_log ATTACH PARTITION more {month(12)}")
    reconcile(get_engine(), host.mapping)
    assert host.value("SELECT expected FROM trueup.drift") == 10_000 - 1_400
