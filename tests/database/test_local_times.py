"""Hosts that store times without a zone: the times are in the mapping's zone, whatever the zone of the session."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup_json
from tests.install.test_script import psql
from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import connect, dispose_engine, get_engine, transaction
from trueup.database.retry import retrying
from trueup.errors import NotInstalledError
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach, attach_script
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings
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
    shown = trueup_json("usage", "list", user)["rows"]
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


TEHRAN = ZoneInfo("Asia/Tehran")


@pytest.fixture
def in_tehran(monkeypatch: pytest.MonkeyPatch) -> HostMapping:
    monkeypatch.setenv("TRUEUP_HOST__TIME_ZONE", "Asia/Tehran")
    get_settings.cache_clear()
    dispose_engine()
    return get_settings().host


def local(moment: datetime) -> datetime:
    return moment.astimezone(TEHRAN).replace(tzinfo=None)


def test_a_new_customer_of_a_host_with_local_times_is_admitted_at_once(host: Host, in_tehran: HostMapping) -> None:
    attach(in_tehran)
    now = datetime.now(UTC)
    user = host.subscriber(10_000, start=local(now), end=local(now + timedelta(hours=1)))
    hold = retrying(lambda worker: hold_tokens(worker, user, 1_000))
    retrying(lambda worker: charge_tokens(worker, hold, 100))
    # The host logs in local time, whatever the zone of its session.
    for zone, tokens, minutes in (("UTC", 1, 0), ("Asia/Tokyo", 2, 0), ("UTC", 4, -1)):
        host.execute(f"SET timezone = '{zone}'")
        host.log(user, tokens, at=local(now + timedelta(minutes=minutes)))
    host.execute("SET timezone = 'Asia/Tehran'")
    account = retrying(lambda worker: read_account(worker, user))
    assert account.consumed == 103
    assert (account.window_start, account.end_date) == (now, now + timedelta(hours=1))
    with connect() as connection:
        rows = list_usage(connection, in_tehran, user)
    assert {row.created_at.tzinfo for row in rows} == {UTC}
    assert max(abs(row.created_at - now) for row in rows) < timedelta(minutes=5)
    assert reconcile(get_engine(), in_tehran, kind="deep").defects == 0
    assert_true(host, in_tehran)


def test_the_script_for_psql_uses_the_mappings_zone(host: Host, in_tehran: HostMapping) -> None:
    user = host.subscriber(10_000, start=local(START))
    write(host, user, "UTC", 1, 3.6)
    write(host, user, "UTC", 2, 3.4)
    with transaction() as connection:
        script = attach_script(connection, in_tehran)
    assert psql(host, script).returncode == 0
    assert host.value("SELECT consumed FROM trueup.balance") == 1


def test_attaching_asks_for_the_zone_if_the_server_or_the_log_is_not_in_utc(host: Host, admin_engine: Engine) -> None:
    user = host.subscriber(10_000)
    database = host.value("SELECT quote_ident(current_database())")
    with admin_engine.connect() as admin:
        admin.execute(text(f"ALTER DATABASE {database} SET timezone = 'Asia/Tehran'"))
    dispose_engine()
    with pytest.raises(NotInstalledError, match=r"sessions are in Asia/Tehran.*for example"):
        attach(HostMapping())
    with admin_engine.connect() as admin:
        admin.execute(text(f"ALTER DATABASE {database} RESET timezone"))
    dispose_engine()
    host.log(user, 5, at=local(datetime.now(UTC)))
    with pytest.raises(NotInstalledError, match="newest time lies 3:30 h ahead of now"):
        attach(HostMapping())
    attach(HostMapping(time_zone="UTC"))


@pytest.mark.parametrize(
    ("name", "said"), [("Asia/Teheran", "did you mean Asia/Tehran"), ("+03:30", "is no time zone")]
)
def test_an_unknown_zone_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HostMapping(time_zone=name)
