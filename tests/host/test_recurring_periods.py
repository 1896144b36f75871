"""Subscriptions whose period repeats each month, with a counter that the host resets."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.mapped import NO_AGE, Remap
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import grant_tokens
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.preview.scan import scan
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import Finding
from trueup.reconcile.shards import find_suspects
from trueup.reports.run_report import read_report

pytestmark = pytest.mark.dated


def monthly(anchor: str, zone: str = "UTC") -> str:
    return f'[host.subscription]\nperiod = {{every = "month", anchor = "{anchor}", time_zone = "{zone}"}}'


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def this_month() -> datetime:
    return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def signed_up(host: Host, tokens: int = 1_000, *, counter: int | None = None) -> int:
    """Sign a user up in the middle of a month, some months ago."""
    before = this_month() - timedelta(days=75)
    return host.subscriber(tokens, start=before, counter=tokens if counter is None else counter)


def causes(connection: Connection) -> list[tuple[str, str, int | None]]:
    report = read_report(connection, "bigint")
    assert report is not None
    return [(row.cause, row.action, row.written) for row in report.rows]


def test_the_counter_that_a_cron_resets_on_the_first_is_no_drift(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(monthly("first"))
    user = signed_up(host, counter=900)
    host.log(user, 950, at=this_month() - timedelta(hours=1))
    host.log(user, 100, at=datetime.now(UTC))
    found: list[Finding] = []
    scan(host.engine, mapping, lambda checked, findings: found.extend(findings), rules=NO_AGE)
    assert found == []
    assert reconcile(get_engine(), mapping, rules=NO_AGE, kind="deep").drifted == 0
    assert find_suspects(connection, mapping, None, None) == []
    assert (host.counter(user), read_account(connection, user).remaining) == (900, 900)
    assert hold_tokens(connection, user, 900).tokens_left == 900
    assert_true(host, mapping)


@pytest.mark.parametrize(
    ("anchor", "zone", "start", "at", "window"),
    [
        ("first", "UTC", "2024-11-15T10:00", "2024-11-20", "2024-11-15T10:00"),
        ("first", "UTC", "2024-11-15T10:00", "2024-12-01", "2024-12-01"),
        ("first", "UTC", "2024-11-15T10:00", "2024-11-30T23:59:59", "2024-11-15T10:00"),
        ("first", "Asia/Tehran", "2024-11-15", "2024-11-30T20:30", "2024-11-30T20:30"),
        ("first", "Asia/Tehran", "2024-11-15", "2024-11-30T20:29", "2024-11-15"),
        ("start_date", "UTC", "2024-11-15T10:00", "2024-12-15T09:59", "2024-11-15T10:00"),
        ("start_date", "UTC", "2024-11-15T10:00", "2024-12-15T10:00", "2024-12-15T10:00"),
        ("start_date", "UTC", "2024-01-31T10:00", "2024-02-29T10:00", "2024-02-29T10:00"),
        ("start_date", "UTC", "2024-01-31T10:00", "2024-03-31T09:59", "2024-02-29T10:00"),
        ("start_date", "UTC", "2024-01-31T10:00", "2024-03-31T10:00", "2024-03-31T10:00"),
        ("start_date", "UTC", "2023-01-31T10:00", "2024-12-31T10:00", "2024-12-31T10:00"),
        # The clocks of New York go back on 3 November: 01:30 comes twice, and the second one begins the period.
        ("start_date", "America/New_York", "2024-10-03T05:30", "2024-11-03T05:45", "2024-10-03T05:30"),
        ("start_date", "America/New_York", "2024-10-03T05:30", "2024-11-03T06:45", "2024-11-03T06:30"),
    ],
)
def test_a_period_begins_at_its_anchor_in_its_zone(
    host: Host,
    connection: Connection,
    remap: Remap,
    anchor: str,
    zone: str,
    start: str,
    at: str,
    window: str,
) -> None:
    remap(monthly(anchor, zone))
    user = host.subscriber(1_000, start=utc(start))
    assert read_account(connection, user, now=utc(at)).window_start == utc(window)


@pytest.mark.parametrize("anchor", ["first", "start_date"])
@pytest.mark.parametrize("start", ["NULL", "'infinity'", "'-infinity'", "'0001-01-01'", "now() + interval '1 day'"])
def test_a_start_that_can_not_repeat_never_fails_a_read(
    host: Host,
    connection: Connection,
    remap: Remap,
    anchor: str,
    start: str,
) -> None:
    mapping = remap(monthly(anchor))
    user = host.subscriber(1_000)
    grant_tokens(connection, user, 5, reason="r", reference="r", by="ann")
    host.execute("ALTER TABLE billing_subscription ALTER start_date DROP NOT NULL")
    host.execute(f"UPDATE billing_subscription SET start_date = {start}")
    ahead = "infinity" in start.replace("-inf", "") or "interval" in start
    assert read_account(connection, user).is_active is not ahead
    reconcile(get_engine(), mapping, rules=NO_AGE)


def test_a_charge_after_the_begin_of_a_period_counts_in_it(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(monthly("first"))
    user = host.subscriber(1_000, start=utc("2024-11-15"))
    host.log(user, 700, at=utc("2024-11-20"))
    hold = hold_tokens(connection, user, 300, now=utc("2024-11-30T23:59:50"), ttl=60)
    charge_tokens(connection, hold, 200, now=utc("2024-12-01T00:00:05"))
    account = read_account(connection, user, now=utc("2024-12-01T00:00:06"))
    assert (account.consumed, account.held, account.available) == (200, 100, 700)
    assert hold_tokens(connection, user, 700, now=utc("2024-12-01T00:00:07")).tokens_left == 700
    assert_true(host, mapping)


def test_periods_that_passed_unseen_use_up_no_grant_that_their_plans_paid_for(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap(monthly("start_date"))
    user = host.subscriber(1_000, start=utc("2024-11-01"))
    grant_tokens(connection, user, 500, reason="r", reference="r", by="ann", now=utc("2024-11-02"))
    for month in ("2024-11", "2024-12", "2025-01", "2025-02"):
        host.log(user, 900, at=utc(f"{month}-20"))
    assert read_account(connection, user, now=utc("2025-02-25")).original == 1_500
    hold_tokens(connection, user, 10, now=utc("2025-02-25"))
    assert read_account(connection, user, now=utc("2025-02-25")).original == 1_500
    host.log(user, 1_200, at=utc("2025-04-05"))
    for at in ("2025-06-10", "2025-06-11"):
        assert read_account(connection, user, now=utc(at)).original == 1_300
        hold_tokens(connection, user, 10, now=utc(at))
    assert host.value("SELECT count(DISTINCT window_start) FROM trueup.window_change") == 8


def test_a_change_of_plan_keeps_the_periods_before_it(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap(monthly("first"))
    user = host.subscriber(1_000, start=utc("2024-11-01"))
    grant_tokens(connection, user, 500, reason="r", reference="r", by="ann", now=utc("2024-11-02"))
    host.log(user, 900, at=utc("2024-11-20"))
    host.log(user, 1_100, at=utc("2024-12-20"))
    # The host changes the plan now, and nothing has read the account since the grant.
    host.execute("UPDATE billing_subscription SET token_plan_id = :plan", plan=host.plan(50))
    assert read_account(connection, user).original == 450
    hold_tokens(connection, user, 10)
    assert read_account(connection, user).original == 450


def test_a_reset_that_has_not_come_yet_is_named_and_made_up_for(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(monthly("first"))
    user = signed_up(host, counter=400)
    host.log(user, 530, at=this_month() - timedelta(hours=1))
    host.log(user, 70, at=datetime.now(UTC))
    reconcile(get_engine(), mapping, rules=NO_AGE)
    assert causes(connection) == [("period_reset", "corrected", 930)]
    assert host.counter(user) == 930


def test_a_late_reset_that_puts_used_tokens_back_is_named_and_made_up_for(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(
        f'{monthly("first")}\n[host.token_usage]\ntable = "billing_tokenusage"',
        "CREATE TABLE billing_tokenusage (id bigserial PRIMARY KEY, subscription_id bigint NOT NULL, "
        "used_tokens integer NOT NULL, usage_date timestamptz NOT NULL DEFAULT now(), description text)",
    )
    user = signed_up(host)
    for tokens in (70, 33, 21):
        host.log(user, tokens, at=datetime.now(UTC))
        host.decrement(user, tokens)
        host.execute(
            "INSERT INTO billing_tokenusage (subscription_id, used_tokens) "
            "SELECT id, :tokens FROM billing_subscription",
            tokens=tokens,
        )
        if tokens == 33:
            host.execute("UPDATE billing_subscription SET tokens_remaining = 1000")
    assert host.counter(user) == 979
    reconcile(get_engine(), mapping, rules=NO_AGE)
    assert causes(connection) == [("period_reset", "corrected", 876)]


def test_a_first_row_that_was_not_subtracted_is_a_missed_decrement(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(monthly("first"))
    user = signed_up(host)
    host.log(user, 70, at=datetime.now(UTC))
    reconcile(get_engine(), mapping, rules=NO_AGE)
    assert causes(connection) == [("missed_decrement", "corrected", 930)]


def test_a_counter_that_ended_with_its_subscription_is_not_reset(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(monthly("first"))
    user = signed_up(host, counter=0)
    host.log(user, 1_000, at=this_month() - timedelta(hours=1))
    host.execute("UPDATE billing_subscription SET is_active = false")
    reconcile(get_engine(), mapping, rules=NO_AGE)
    assert causes(connection) == [("burned_at_expiry", "reported", None)]


def test_a_surplus_of_a_plans_size_is_not_taken_as_a_late_reset(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(monthly("first"))
    user = signed_up(host)
    host.plan(103)
    for tokens in (70, 33):
        host.log(user, tokens, at=datetime.now(UTC))
    reconcile(get_engine(), mapping, rules=NO_AGE)
    [(_, action, _)] = causes(connection)
    assert (action, host.counter(user)) == ("review", 1_000)


def test_without_the_setting_a_period_lasts_until_the_start_moves(host: Host, connection: Connection) -> None:
    user = signed_up(host)
    host.log(user, 950, at=this_month() - timedelta(hours=1))
    assert read_account(connection, user).consumed == 950
    assert HostMapping().subscription.period is None
