"""The journal of the counters: what its trigger appends, and what it never does to the host."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.support.host import START, Host, pooled_engine
from tests.support.work import charge_tokens, hold_tokens
from trueup.doctor.invariants import check_invariants
from trueup.drift.journal import prune_journal
from trueup.host.fields import SubscriptionTable
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.detach import detach
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings

Entry = tuple[Any, ...]


def entries(host: Host, user: int) -> list[Entry]:
    """Return kind, old and new value and writer of each entry of a user, in order."""
    return [
        tuple(row)
        for row in host.execute(
            "SELECT kind, old_counter, new_counter, written_by FROM trueup.counter_entry "
            "WHERE user_id = :user ORDER BY id",
            user=user,
        )
    ]


def set_counter(host: Host, user: int, value: int | None) -> None:
    host.execute(
        "UPDATE billing_subscription SET tokens_remaining = :value WHERE user_id = :user", value=value, user=user
    )


def unseen(connection: Connection) -> str:
    """Return the level of doctor's finding about invariant I7."""
    (found,) = [one for one in check_invariants(connection, get_settings()) if one.detail.get("invariant") == "I7"]
    return found.level


@pytest.fixture
def other(host: Host) -> Iterator[Connection]:
    """Another session of the host, in a transaction."""
    engine = pooled_engine(host.engine.url)
    with engine.connect() as connection:
        yield connection
        connection.rollback()
    engine.dispose()


def test_every_change_of_a_counter_is_appended_with_its_writer(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.execute("SET application_name = 'shop'")
    host.decrement(user, 100)
    host.execute("UPDATE billing_subscription SET is_active = false WHERE user_id = :user", user=user)
    set_counter(host, user, None)
    set_counter(host, user, 2_000)
    assert entries(host, user) == [
        ("created", None, 1_000, "host"),
        ("changed", 1_000, 900, "host"),
        ("changed", 900, None, "host"),
        ("changed", None, 2_000, "host"),
    ]
    row = host.execute(
        "SELECT * FROM trueup.counter_entry WHERE user_id = :user AND old_counter = 900", user=user
    ).one()
    assert (row.application_name, row.backend_pid) == ("shop", host.value("SELECT pg_backend_pid()"))
    assert row.window_start == START
    assert unseen(connection) == "ok"


def test_trueups_own_writes_are_marked(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 300)
    charge_tokens(connection, hold, 250)
    set_counter(host, user, 999)
    assert [entry[3] for entry in entries(host, user)] == ["host", "charge", "host"]
    connection.execute(
        text("SELECT trueup.correct_counters(ARRAY[:user], ARRAY[:id], ARRAY[999], ARRAY[750])"),
        {"user": user, "id": host.value("SELECT CAST(id AS text) FROM billing_subscription")},
    )
    assert entries(host, user)[-1] == ("changed", 999, 750, "correction")


def test_a_setting_of_the_hosts_does_not_pass_for_trueups_mark(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.execute("SET trueup.own_counter = 'charge'")
    host.decrement(user, 100)
    assert entries(host, user)[-1] == ("changed", 1_000, 900, "host")


def test_several_changes_in_one_transaction_are_all_there(host: Host, other: Connection) -> None:
    user = host.subscriber(1_000)
    for tokens in (100, 200):
        other.execute(text(f"UPDATE billing_subscription SET tokens_remaining = tokens_remaining - {tokens}"))
    other.execute(text("SAVEPOINT s"))
    other.execute(text("UPDATE billing_subscription SET tokens_remaining = 5"))
    other.execute(text("ROLLBACK TO s"))
    other.commit()
    assert entries(host, user)[1:] == [("changed", 1_000, 900, "host"), ("changed", 900, 700, "host")]
    assert host.value("SELECT count(DISTINCT transaction_id) FROM trueup.counter_entry WHERE kind = 'changed'") == 1


def test_a_subscription_deleted_and_made_again_and_one_moved_to_another_user(
    host: Host, connection: Connection
) -> None:
    user, second = host.subscriber(1_000), host.user()
    host.execute("UPDATE billing_subscription SET user_id = :second, tokens_remaining = 900", second=second)
    assert entries(host, user) == [("created", None, 1_000, "host"), ("deleted", 1_000, None, "host")]
    assert entries(host, second) == [("created", None, 900, "host")]
    row = host.execute("DELETE FROM billing_subscription RETURNING id, token_plan_id").one()
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
        "VALUES (:id, :user, :plan, :at, 300)",
        id=row.id,
        user=second,
        plan=row.token_plan_id,
        at=START,
    )
    assert entries(host, second)[1:] == [("deleted", 900, None, "host"), ("created", None, 300, "host")]
    assert unseen(connection) == "ok"


def test_a_new_period_or_plan_is_appended_although_the_counter_stays(host: Host) -> None:
    user = host.subscriber(1_000)
    later = START + timedelta(days=30)
    host.execute("UPDATE billing_subscription SET start_date = :at", at=later)
    plan = host.plan(5_000)
    host.execute("UPDATE billing_subscription SET token_plan_id = :plan", plan=plan)
    assert entries(host, user)[1:] == [("changed", 1_000, 1_000, "host")] * 2
    found = host.execute("SELECT window_start, token_plan_id FROM trueup.counter_entry ORDER BY id DESC LIMIT 1").one()
    assert found == (later, str(plan))


def test_a_counter_as_large_as_the_column_allows(host: Host) -> None:
    host.execute("ALTER TABLE billing_subscription ALTER tokens_remaining TYPE bigint")
    user = host.subscriber(1_000)
    set_counter(host, user, 2**63 - 1)
    assert entries(host, user)[-1] == ("changed", 1_000, 2**63 - 1, "host")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE billing_subscription ALTER tokens_remaining TYPE bigint, ALTER start_date TYPE timestamptz(3)",
        (
            "ALTER TABLE billing_subscription RENAME tokens_remaining TO left_over; "
            "UPDATE billing_subscription SET left_over = 3; DELETE FROM billing_subscription"
        ),
        (
            "ALTER TABLE billing_subscription ALTER tokens_remaining TYPE numeric; "
            "UPDATE billing_subscription SET tokens_remaining = 1e30"
        ),
        "DROP TABLE trueup.counter_entry; UPDATE billing_subscription SET tokens_remaining = 3",
        "ALTER TABLE billing_subscription DROP COLUMN tokens_remaining CASCADE; DELETE FROM billing_subscription",
    ],
)
def test_no_change_by_the_host_fails_because_of_the_journal(host: Host, change: str) -> None:
    host.subscriber(1_000)
    host.execute(change)


def test_a_writer_of_the_host_does_not_wait_for_another_ones_entries(host: Host, other: Connection) -> None:
    first, second = host.subscriber(1_000), host.subscriber(1_000)
    other.execute(text("UPDATE billing_subscription SET tokens_remaining = 1 WHERE user_id = :user"), {"user": first})
    host.execute("SET lock_timeout = '1ms'")
    host.decrement(second, 100)
    assert entries(host, second)[-1] == ("changed", 1_000, 900, "host")


def test_a_host_without_rights_on_trueups_schema_can_change_counters(host: Host) -> None:
    user = host.subscriber(1_000)
    host.execute("DROP ROLE IF EXISTS plain_host")
    host.execute("CREATE ROLE plain_host")
    host.execute("GRANT SELECT, UPDATE ON billing_subscription TO plain_host")
    host.execute("SET ROLE plain_host")
    host.decrement(user, 100)
    host.execute("RESET ROLE")
    assert entries(host, user)[-1] == ("changed", 1_000, 900, "host")
    host.execute("DROP OWNED BY plain_host")
    host.execute("DROP ROLE plain_host")


def test_a_change_while_triggers_are_off_breaks_invariant_7(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.execute("SET session_replication_role = replica")
    set_counter(host, user, 5_000)
    assert unseen(connection) == "error"


def test_the_journal_begins_again_after_its_trigger_was_off(host: Host, connection: Connection) -> None:
    since = connection.scalar(text("SELECT trueup.journal_since()"))
    assert since is not None
    with host.engine.begin() as setup:
        install(setup, HostMapping(), with_host_tables=False)
    assert connection.scalar(text("SELECT trueup.journal_since()")) == since
    host.execute("ALTER TABLE billing_subscription DISABLE TRIGGER trueup_window_changed")
    assert connection.scalar(text("SELECT trueup.journal_since()")) is None
    host.execute("ALTER TABLE billing_subscription ENABLE TRIGGER trueup_window_changed")
    assert connection.scalar(text("SELECT trueup.journal_since()")) is None
    attach(HostMapping())
    assert connection.scalar(text("SELECT trueup.journal_since()")) > since


def test_detaching_and_attaching_begins_the_journal_again(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    detach()
    host.decrement(user, 100)
    attach(HostMapping())
    host.decrement(user, 50)
    assert entries(host, user) == [("changed", 900, 850, "host")]
    assert unseen(connection) == "ok"


def test_a_table_that_is_mapped_no_longer_has_no_trigger(host: Host) -> None:
    host.execute("CREATE TABLE subs (LIKE billing_subscription INCLUDING ALL)")
    with host.engine.begin() as setup:
        install(setup, HostMapping(subscription=SubscriptionTable(table="subs")), with_host_tables=False)
    assert host.execute(
        "SELECT CAST(CAST(tgrelid AS regclass) AS text) FROM pg_trigger WHERE tgname = 'trueup_window_changed'"
    ).scalars().all() == ["subs"]


def test_old_entries_are_deleted_once_a_run_has_settled_them(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.decrement(user, 100)
    old, none = timedelta(0), timedelta(days=1)
    assert prune_journal(connection, older_than=old, limit=10) == 0
    reconcile(host.engine, HostMapping())
    host.decrement(user, 50)
    settled = len(entries(host, user)) - 1
    assert prune_journal(connection, older_than=none, limit=10) == 0
    pruned = prune_journal(connection, older_than=old, limit=10)
    assert 0 < pruned <= settled
    assert entries(host, user)[-1][0] == "changed"
    assert unseen(connection) == "ok"
