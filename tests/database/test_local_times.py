"""Hosts that store times without a zone: the times are UTC, whatever the zone of the session."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup_json
from tests.install.test_script import psql
from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import connect, get_engine, transaction
from trueup.database.retry import retrying
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach, attach_script
from trueup.reconcile.local_run import reconcile
from trueup.usage.log import list_usage

pytestmark = pytest.mark.dated

ZONES = ("Asia/Tokyo", "America/New_York")
BARE = START.replace(tzinfo=None)


@pytest.fixture(autouse=True)
def _local(host: Host) -> None:
    """Change all times of the host to times without a zone."""
    host.execute(
        "DROP SCHEMA trueup CASCADE; "
        "ALTER TABLE ai_usage_log ALTER created_at TYPE timestamp; "
        "ALTER TABLE billing_subscription ALTER start_date TYPE timestamp, ALTER end_date TYPE timestamp"
    )


def write(host: Host, user: int, zone: str, tokens: int, hours: float) -> None:
    """Log usage from a session in that zone, `hours` after the start of the window."""
    host.execute(f"SET timezone = '{zone}'")
    host.execute(
        "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) VALUES (:user, 'chat', :tokens, :at)",
        user=user,
        tokens=tokens,
        at=BARE + timedelta(hours=hours),
    )
    host.execute("SET timezone = 'UTC'")


@pytest.mark.parametrize("zone", ZONES)
def test_rows_count_by_utc_whatever_the_hosts_session_says(host: Host, zone: str) -> None:
    attach(HostMapping())
    user = host.subscriber(10_000)
    hold = retrying(lambda worker: hold_tokens(worker, user, 1_000))
    for tokens, hours in ((1, 0.5), (2, 30), (4, -0.5), (8, -30)):
        write(host, user, zone, tokens, hours)
    host.execute(f"SET timezone = '{zone}'")
    host.execute("UPDATE ai_usage_log SET total_tokens = 3 WHERE total_tokens = 2")
    host.execute("DELETE FROM ai_usage_log WHERE total_tokens = 4")
    host.execute("SET timezone = 'UTC'")
    retrying(lambda worker: charge_tokens(worker, hold, 100))
    assert retrying(lambda worker: read_account(worker, user)).consumed == 104
    assert_true(host)
    with connect() as connection:
        rows = list_usage(connection, HostMapping(), user)
    assert {row.created_at.tzinfo for row in rows} == {UTC}
    assert abs(rows[0].created_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert reconcile(get_engine(), HostMapping(), kind="deep").defects == 0


def test_the_script_for_psql_fills_by_utc(host: Host) -> None:
    user = host.subscriber(10_000)
    for tokens, hours in ((1, 0.5), (2, -0.5)):
        write(host, user, "UTC", tokens, hours)
    with transaction() as connection:
        script = attach_script(connection, HostMapping())
    host.execute("ALTER ROLE postgres SET timezone = 'Asia/Tokyo'")
    try:
        done = psql(host, script)
    finally:
        host.execute("ALTER ROLE postgres RESET timezone")
    assert (done.returncode, done.stderr) == (0, "")
    assert host.value("SELECT consumed FROM trueup.balance") == 1
    assert_true(host)


def test_the_preview_and_later_runs_find_the_same_drift(host: Host) -> None:
    user = host.subscriber(10_000, end=START + timedelta(days=3650))
    write(host, user, "UTC", 700, 1)
    look = trueup_json("drift", "report", "--read-only")
    attach(HostMapping())
    engine = create_engine(host.engine.url, poolclass=NullPool)
    summary = reconcile(engine, HostMapping(), dry_run=True)
    engine.dispose()
    assert [(row["expected"], row["observed"]) for row in look["rows"]] == [(9_300, 10_000)]
    assert [(one.drift.expected, one.drift.observed) for one in summary.findings] == [(9_300, 10_000)]
    shown = trueup_json("usage", user)
    assert shown[0]["created_at"].endswith("+00:00")


@pytest.mark.parametrize("kind", ["timestamp(0)", "timestamptz(0)"])
def test_a_log_with_whole_seconds_counts_usage_at_the_begin_of_a_window(host: Host, kind: str) -> None:
    host.execute(
        f"ALTER TABLE ai_usage_log ALTER created_at TYPE {kind}; "
        "ALTER TABLE billing_subscription ALTER start_date TYPE timestamptz"
    )
    attach(HostMapping())
    user = host.subscriber(10_000)
    host.execute("UPDATE billing_subscription SET start_date = date_trunc('second', now()) + interval '60.4 s'")
    hold = retrying(lambda worker: hold_tokens(worker, user, 1_000))
    retrying(lambda worker: charge_tokens(worker, hold, 100))
    assert retrying(lambda worker: read_account(worker, user)).consumed == 100
    assert_true(host)
