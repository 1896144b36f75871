from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.support.books import assert_true
from tests.support.host import NOW, START, Host
from tests.support.sessions import locked_balance
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.accounts.account import days_between, read_account, read_decision

pytestmark = pytest.mark.dated


def grant(host: Host, user: int, tokens: int, **more: Any) -> None:
    values = {"granted_at": START, "expires_at": None, "revoked_at": None, **more}
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_at, expires_at, revoked_at, revoked_by) "
        "VALUES (:user, :tokens, 'test', :granted_at, :expires_at, :revoked_at, "
        "CASE WHEN CAST(:revoked_at AS timestamptz) IS NOT NULL THEN 'me' END)",
        user=user,
        tokens=tokens,
        **values,
    )


def test_consumed_is_the_logs_sum_from_the_start_of_the_window_on(host: Host, connection: Connection) -> None:
    user = host.subscriber(10_000)
    host.log(user, 1, at=START - timedelta(microseconds=1))
    host.log(user, 10, at=START)
    host.log(user, 100, success=False)
    host.log(user, 1_000)
    account = read_account(connection, user)
    assert (account.original, account.consumed, account.remaining) == (10_000, 1_010, 8_990)


def test_a_user_without_a_subscription_has_an_account_of_zeros(host: Host, connection: Connection) -> None:
    for user in (host.user(), 2**63 - 1, -5):
        account = read_account(connection, user)
        assert not account.subscribed
        assert (account.original, account.consumed, account.held, account.remaining) == (0, 0, 0, 0)
        assert (account.counter, account.drift, account.end_date, account.window_start) == (None, None, None, None)


def test_remaining_and_available_stop_at_zero(host: Host, connection: Connection) -> None:
    user = host.subscriber(100)
    host.log(user, 250)
    account = read_account(connection, user)
    assert (account.consumed, account.remaining, account.available) == (250, 0, 0)


def test_available_excludes_held_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 300)
    account = read_account(connection, user)
    assert (account.held, account.remaining, account.available) == (300, 1_000, 700)


def test_overdue_holds_are_not_counted_as_held(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 300, ttl=60, now=NOW)
    hold_tokens(connection, user, 50, ttl=600, now=NOW)
    assert read_account(connection, user, now=NOW + timedelta(seconds=59)).held == 350
    assert read_account(connection, user, now=NOW + timedelta(seconds=60)).held == 50


@pytest.mark.parametrize(
    ("token_plan", "full_plan", "original"),
    [(700, None, 700), (None, 900, 900), (700, 900, 700), (None, None, 0), (0, 900, 0), (-5, None, 0)],
)
def test_original_is_the_token_plan_else_the_full_plan_else_nothing(
    host: Host, connection: Connection, token_plan: int | None, full_plan: int | None, original: int
) -> None:
    user = host.subscriber()
    host.execute(
        "UPDATE billing_subscription SET token_plan_id = :token, full_plan_id = :full",
        token=None if token_plan is None else host.plan(token_plan),
        full=None if full_plan is None else host.plan(full_plan, kind="full"),
    )
    assert read_account(connection, user).original == original


def test_the_full_plan_counts_if_the_token_plan_states_no_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    host.execute("ALTER TABLE billing_tokenplan ALTER tokens_included DROP NOT NULL")
    host.execute("UPDATE billing_tokenplan SET tokens_included = NULL")
    host.execute("UPDATE billing_subscription SET full_plan_id = :full", full=host.plan(80, kind="full"))
    assert read_account(connection, user).original == 80


@pytest.mark.parametrize(
    ("more", "counts"),
    [
        ({}, True),
        ({"granted_at": START - timedelta(days=9)}, True),  # tokens left carry over into a new window
        ({"granted_at": NOW}, True),
        ({"granted_at": NOW + timedelta(seconds=1)}, False),
        ({"expires_at": NOW}, False),
        ({"expires_at": NOW + timedelta(seconds=1)}, True),
        ({"revoked_at": START}, False),
    ],
)
def test_grants_add_to_original_until_they_end(
    host: Host, connection: Connection, more: dict[str, Any], counts: bool
) -> None:
    user = host.subscriber(1_000)
    grant(host, user, 50, **more)
    grant(host, user, 3)
    assert read_account(connection, user, now=NOW).original == (1_053 if counts else 1_003)


def test_drift_is_the_counter_minus_the_remaining_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000, counter=400)
    host.log(user, 900)
    account = read_account(connection, user)
    assert (account.counter, account.drift) == (400, 300)
    host.execute("UPDATE billing_subscription SET tokens_remaining = NULL")
    assert read_account(connection, user).drift is None


def test_a_moved_window_is_read_from_the_log_at_once_and_rebuilt_by_the_next_gate(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(10_000)
    host.log(user, 100, at=START)
    host.log(user, 30, at=START + timedelta(days=2))
    hold = hold_tokens(connection, user, 500)
    for start, consumed in ((START + timedelta(days=1), 30), (START - timedelta(days=1), 130)):
        host.execute("UPDATE billing_subscription SET start_date = :start", start=start)
        assert read_account(connection, user).consumed == consumed
        hold_tokens(connection, user, 0)
        assert balance(host, user) == (consumed, 500)
    charge_tokens(connection, hold, 20)
    assert read_account(connection, user).consumed == 150
    assert_true(host)


def test_a_read_waits_for_no_lock_and_sees_unfolded_deltas(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 10)
    host.log(user, 5)
    connection.execute(text("SET lock_timeout = '100ms'"))
    with locked_balance(host, user):
        assert read_account(connection, user).consumed == 5
    assert host.value("SELECT count(*) FROM trueup.usage_delta") == 1


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("infinity", "infinity"),
        ("-infinity", "-infinity"),
        ("4000-01-01 BC", "4000-01-01 BC"),
        ("0001-01-01", "0001-01-01"),
        ("9999-12-31 23:59:59", "9999-12-31 23:59:59"),
        ("12000-01-01", "12000-01-01"),
        (None, None),
    ],
)
def test_dates_beyond_pythons_calendar_are_read_and_gated(
    host: Host, connection: Connection, start: str | None, end: str | None
) -> None:
    user = host.subscriber(1_000)
    host.execute("ALTER TABLE billing_subscription ALTER start_date DROP NOT NULL")
    host.execute(
        "UPDATE billing_subscription SET start_date = CAST(:start AS timestamptz), "
        "end_date = CAST(:end AS timestamptz)",
        start=start,
        end=end,
    )
    host.log(user, 5)
    account, reason = read_decision(connection, user, 1)
    long_ago = end is not None and (end.startswith(("-", "0001")) or end.endswith("BC"))
    far_ahead = start is not None and start.startswith(("inf", "9999", "12000"))
    expected = "subscription_deactivated" if far_ahead else "subscription_expired" if long_ago else None
    assert reason == expected
    assert account.days_remaining is None or long_ago
    if expected is None:
        hold_tokens(connection, user, 1)
    assert_true(host)


def test_a_deleted_subscription_leaves_no_account_and_a_new_one_starts_true(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 100, task="t")
    host.log(user, 40)
    row = host.execute("DELETE FROM billing_subscription RETURNING id, user_id, token_plan_id, start_date").one()
    assert not read_account(connection, user).subscribed
    host.log(user, 2)
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date) VALUES (:id, :user, :plan, :start)",
        id=row.id,
        user=user,
        plan=row.token_plan_id,
        start=row.start_date,
    )
    account = read_account(connection, user)
    assert (account.consumed, account.held) == (42, 100)
    assert_true(host)


@pytest.mark.parametrize(
    ("hours", "days"), [(-30, 0), (0, 0), (23.99, 0), (24, 1), (47.99, 1), (24 * 365, 365), (None, None)]
)
def test_days_remaining_are_full_days_and_none_without_an_end(hours: float | None, days: int | None) -> None:
    now = datetime(2024, 11, 5, tzinfo=UTC)
    assert days_between(now, None if hours is None else now + timedelta(hours=hours)) == days


def test_a_read_uses_the_indexes(host: Host, connection: Connection) -> None:
    """PostgreSQL inlines the functions, so a read of one user does not scan the subscriptions or the log."""
    host.execute(
        "INSERT INTO accounts_user SELECT n, 'u' || n, '' FROM generate_series(1, 2000) n; "
        "INSERT INTO billing_subscription (id, user_id, start_date) "
        "SELECT n, n, now() FROM generate_series(1, 2000) n; "
        "INSERT INTO ai_usage_log (user_id, section) SELECT n, 'chat' FROM generate_series(1, 2000) n; ANALYZE"
    )
    plan = connection.execute(text("EXPLAIN SELECT * FROM trueup.accounts(now()) WHERE user_id = 7")).scalars()
    scanned = [line for line in plan if "Seq Scan on billing_subscription" in line or "Seq Scan on ai_usage" in line]
    assert not scanned
