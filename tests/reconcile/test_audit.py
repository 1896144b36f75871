"""The deep pass finds defects of trueup's own tables, repairs them where possible, and reports all."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.support.books import assert_true, dump
from tests.support.host import START, Host
from tests.support.sessions import in_background, locked_balance, wait_for_lock
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.reconcile.audit import read_defects
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.settings.policies import Rules

Found = list[tuple[str, Any, int | None, int | None, bool]]


@pytest.fixture
def deep(host: Host, connection: Connection) -> Callable[..., Found]:
    """Do a deep pass. Returns its defects as (kind, user, seen, expected, repaired)."""

    def deep(**more: Any) -> Found:
        summary: RunSummary = reconcile(
            get_engine(), HostMapping(), kind="deep", rules=Rules(min_age_seconds=0), **more
        )
        rows = summary.defect_rows if summary.run_id is None else read_defects(connection, "bigint", summary.run_id)
        assert summary.defects == len(rows)
        return [(row.kind, row.user_id, row.seen, row.expected, row.repaired) for row in rows]

    return deep


def user_with_balance(host: Host, connection: Connection, used: int = 300) -> int:
    """A user whose balance is up to date and whose counter is right."""
    user = host.subscriber(10_000, counter=10_000 - used)
    host.log(user, used)
    hold_tokens(connection, user, 0)
    return user


def bypass(host: Host, statement: str, **values: Any) -> None:
    """Write to the log with its triggers disabled, as a restore or a careless superuser does."""
    with host.engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text(statement), values)


def test_correct_tables_have_no_defect(host: Host, connection: Connection, deep: Callable[..., Found]) -> None:
    user = user_with_balance(host, connection)
    host.log(user, 40)
    charge_tokens(connection, hold_tokens(connection, user), 60)
    hold_tokens(connection, user, 70)
    host.log(user_with_balance(host, connection), 5)
    assert deep() == []
    assert deep(dry_run=True) == []
    assert_true(host)


def test_usage_missed_by_the_triggers_is_found_and_the_balance_repaired(
    host: Host, connection: Connection, deep: Callable[..., Found]
) -> None:
    user, other = user_with_balance(host, connection), user_with_balance(host, connection)
    host.log(other, 11)
    bypass(host, "UPDATE ai_usage_log SET total_tokens = 500 WHERE user_id = :user", user=user)
    host.log(user, 20)
    assert deep() == [("balance_untrue", user, 320, 520, True)]
    assert_true(host)
    assert balance(host, user)[0] == 520
    assert host.value("SELECT expected FROM trueup.drift WHERE user_id = :user", user=user) == 9_480, (
        "the counter is compared after the repair"
    )
    assert deep() == []


def test_a_dry_deep_pass_writes_nothing(host: Host, connection: Connection, deep: Callable[..., Found]) -> None:
    user = user_with_balance(host, connection)
    bypass(host, "DELETE FROM ai_usage_log WHERE user_id = :user", user=user)
    host.execute("UPDATE trueup.balance SET held = 7")
    host.log(host.user(), 5)
    before = dump(host)
    assert sorted(deep(dry_run=True)) == [
        ("balance_untrue", user, 300, 0, False),
        ("deltas_without_subscription", None, 1, 0, False),
        ("held_untrue", user, 7, 0, False),
    ]
    assert dump(host) == before


def test_tokens_held_without_an_open_hold_are_released(
    host: Host, connection: Connection, deep: Callable[..., Found]
) -> None:
    user = user_with_balance(host, connection)
    hold_tokens(connection, user, 100)
    host.execute("UPDATE trueup.balance SET held = held + 900")
    assert deep() == [("held_untrue", user, 1_000, 100, True)]
    assert_true(host)


def test_overdue_holds_are_expired(host: Host, connection: Connection, deep: Callable[..., Found]) -> None:
    user = user_with_balance(host, connection)
    hold_tokens(connection, user, 100)
    host.execute("UPDATE trueup.hold SET expires_at = clock_timestamp() - interval '9 minutes'")
    assert deep() == []
    hold_tokens(connection, user, 100)
    host.execute("UPDATE trueup.hold SET expires_at = expires_at - interval '2 hours' WHERE status = 'open'")
    assert deep() == [("holds_overdue", None, 1, 0, True)]
    assert balance(host, user)[1] == 0
    assert_true(host)


def test_a_missing_trigger_on_the_subscriptions_is_reported(host: Host, deep: Callable[..., Found]) -> None:
    host.execute("ALTER TABLE billing_subscription DISABLE TRIGGER trueup_window_changed")
    assert deep() == [("trigger_idle", None, None, None, False)]


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted", "D"),
        ("ALTER TABLE ai_usage_log ENABLE REPLICA TRIGGER trueup_inserted", "R"),
        ("DROP TRIGGER trueup_inserted ON ai_usage_log", "missing"),
    ],
)
def test_a_missing_or_disabled_trigger_is_reported_and_its_usage_added_to_the_balance(
    host: Host, connection: Connection, deep: Callable[..., Found], how: str, state: str
) -> None:
    user = user_with_balance(host, connection)
    host.execute(how)
    host.log(user, 44)
    assert deep() == [
        ("trigger_idle", None, None, None, False),
        ("balance_untrue", user, 300, 344, True),
    ]
    assert host.value("SELECT detail FROM trueup.defect ORDER BY id LIMIT 1") == {
        "trigger": "trueup_inserted",
        "state": state,
    }
    assert host.counter(user) == 10_000 - 344


def test_deltas_of_users_without_a_subscription_are_deleted(
    host: Host, connection: Connection, deep: Callable[..., Found]
) -> None:
    unsubscribed = host.user()
    host.log(unsubscribed, 5)
    host.log(unsubscribed, 6)
    new = host.subscriber(1_000, counter=993)
    host.log(new, 7)
    assert deep() == [("deltas_without_subscription", None, 2, 0, True)]
    assert host.value("SELECT count(*) FROM trueup.usage_delta") == 0
    assert_true(host)
    assert deep() == []


def test_defects_that_only_a_person_can_repair_are_reported(
    host: Host, connection: Connection, deep: Callable[..., Found]
) -> None:
    refunded, future, charged = (user_with_balance(host, connection) for _ in range(3))
    host.log(refunded, -1_000)
    hold_tokens(connection, refunded, 0)
    host.execute("UPDATE trueup.balance SET log_epoch = 99 WHERE user_id = :user", user=future)
    charge_tokens(connection, hold_tokens(connection, charged), 60)
    host.execute("DELETE FROM ai_usage_log WHERE id::text IN (SELECT log_id FROM trueup.charge)")
    host.execute(
        "INSERT INTO trueup.hold (user_id, task_id, attempt, feature_name, section, owner, status, tokens_reserved, "
        "opened_at, expires_at) VALUES (:user, 't', 1, 'F', 'chat', 'x', 'open', 9, now(), 'infinity')",
        user=host.user(),
    )
    found = {kind: (user, seen, expected, repaired) for kind, user, seen, expected, repaired in deep()}
    assert found["balance_negative"] == (refunded, -700, 0, False)
    assert found["balance_of_the_future"] == (future, 99, 0, False)
    assert found["charge_without_log_row"] == (charged, 60, None, False)
    assert found["hold_without_balance"][1:] == (9, None, False)
    assert len(found) == 4


def test_a_stale_balance_is_not_a_defect(host: Host, connection: Connection, deep: Callable[..., Found]) -> None:
    user = user_with_balance(host, connection)
    host.execute(
        "UPDATE billing_subscription SET start_date = :start, tokens_remaining = 10000", start=START.replace(day=2)
    )
    assert deep() == []
    assert balance(host, user)[0] == 0
    host.execute("TRUNCATE ai_usage_log")
    assert deep() == []
    assert_true(host)


def test_a_balance_is_compared_again_under_its_lock(
    host: Host, connection: Connection, deep: Callable[..., Found]
) -> None:
    """A write that was in progress when the sums were compared is not a defect."""
    user = user_with_balance(host, connection)
    bypass(host, "UPDATE ai_usage_log SET total_tokens = 500 WHERE user_id = :user", user=user)
    with in_background() as submit:
        with locked_balance(host, user) as other:
            found = submit(deep)
            wait_for_lock(host)
            other.execute(text("UPDATE trueup.balance SET consumed = 500 WHERE user_id = :user"), {"user": user})
            other.commit()
        assert found.result() == []
    assert balance(host, user)[0] == 500


def test_a_deep_pass_in_shards_finds_the_same(
    host: Host, connection: Connection, deep: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.reconcile.local_run.SMALLEST_SHARD", 2)
    users = [user_with_balance(host, connection) for _ in range(8)]
    bypass(host, "UPDATE ai_usage_log SET total_tokens = 400")
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_deleted")
    found = deep(jobs=2)
    assert [row for row in found if row[1] is None] == [("trigger_idle", None, None, None, False)]
    mismatches = sorted((row for row in found if row[1] is not None), key=lambda row: row[1])
    assert mismatches == [("balance_untrue", user, 300, 400, True) for user in users]
    assert_true(host)


def test_the_charges_of_a_user_whom_the_host_has_deleted_are_no_defect(
    host: Host, connection: Connection, deep: Callable[..., Found]
) -> None:
    user = host.subscriber(10_000)
    charge_tokens(connection, hold_tokens(connection, user), 60)
    host.execute("UPDATE trueup.hold SET status = 'settled', closed_at = now()")
    for table, column in (("ai_usage_log", "user_id"), ("billing_subscription", "user_id"), ("accounts_user", "id")):
        host.execute(f"DELETE FROM {table} WHERE {column} = :user", user=user)
    assert [one for one in deep() if one[0] == "charge_without_log_row"] == []
