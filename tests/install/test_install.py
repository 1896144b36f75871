from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from tests.support.books import assert_true
from tests.support.host import Host, pooled_engine
from tests.support.sessions import impatient, in_background, locked, run_at_once, wait_for_lock
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect
from trueup.database.locks import INSTALL_LOCK
from trueup.errors import NotInstalledError
from trueup.host.fields import SubscriptionTable, UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.install.install import check_installed, install
from trueup.settings.settings import get_settings


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    engine = pooled_engine(empty_database)
    yield engine
    engine.dispose()


def set_up(engine: Engine, mapping: HostMapping | None = None, *, with_host_tables: bool = True) -> list[str]:
    with engine.begin() as connection:
        return install(connection, mapping or HostMapping(), with_host_tables=with_host_tables)


def test_install_returns_the_steps_that_it_did(engine: Engine) -> None:
    assert set_up(engine) == ["host tables", "tables", "functions and triggers"]


def test_install_may_be_repeated_and_keeps_everything(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user), 300)
    host.log(user, 20)
    before = host.execute("SELECT * FROM trueup.balance").all()
    for _ in range(2):
        assert set_up(host.engine, with_host_tables=False) == ["tables", "functions and triggers"]
    assert host.execute("SELECT * FROM trueup.balance").all() == before
    assert host.value("SELECT count(*) FROM trueup.installation") == 1
    host.log(user, 5)
    assert_true(host)
    hold_tokens(connection, user, 0)
    assert host.execute("SELECT consumed FROM trueup.balance").scalar_one() == 325


def test_concurrent_installers_are_serialized(engine: Engine) -> None:
    assert len(run_at_once([lambda: set_up(engine)] * 4)) == 4
    with engine.connect() as connection:
        check_installed(connection)


def test_an_installer_waits_for_another_longer_than_for_a_table(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.install.install.LOCK_TIMEOUT_SECONDS", 0.05)
    waits = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory' "
        "AND clock_timestamp() - query_start > '200 ms'"
    )
    with Host(engine) as host, in_background() as submit:
        with locked(host, "SELECT pg_advisory_xact_lock(:key)", key=INSTALL_LOCK):
            second = submit(set_up, engine)
            wait_for(lambda: second.done() or host.value(waits), "the second installer to wait")
            assert not second.done()
        assert second.result() == ["host tables", "tables", "functions and triggers"]


def test_usage_from_before_the_setup_counts(engine: Engine) -> None:
    set_up(engine)
    with Host(engine) as host:
        user = host.subscriber(1_000)
        host.execute("DROP SCHEMA trueup CASCADE")
        host.log(user, 100)
        set_up(engine)
        host.log(user, 20)
        with connect() as connection:
            hold_tokens(connection, user, 880)
        assert_true(host)


def test_missing_host_tables_are_named_and_nothing_is_changed(engine: Engine) -> None:
    mapping = HostMapping(subscription=SubscriptionTable(table="app.Subs"))
    with pytest.raises(NotInstalledError, match=r"table accounts_user, .*, app\.Subs, ai_usage_log\."):
        set_up(engine, mapping, with_host_tables=False)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT to_regnamespace('trueup') IS NULL"))
        with pytest.raises(NotInstalledError, match="trueup db attach"):
            check_installed(connection)


@pytest.mark.parametrize(
    ("noun", "column"),
    [
        ("usage_log", UsageLogTable(response_time_ms="latency")),
        ("usage_log", UsageLogTable(metadata="meta")),
        ("subscription", SubscriptionTable(tokens_remaining="left")),
    ],
)
def test_install_finds_a_missing_column_before_the_first_charge(host: Host, noun: str, column: Any) -> None:
    (name,) = (value for value in column.model_dump().values() if value in ("latency", "meta", "left"))
    with pytest.raises(NotInstalledError, match=rf"{column.table}\.{name}"):
        set_up(host.engine, HostMapping(**{noun: column}), with_host_tables=False)


def test_a_log_with_a_required_column_that_trueup_does_not_write_is_refused(host: Host) -> None:
    """Otherwise every charge would fail after its tokens are spent."""
    host.execute(
        "ALTER TABLE ai_usage_log ADD cost numeric NOT NULL, ADD note text NOT NULL DEFAULT '', "
        "ADD n int GENERATED ALWAYS AS IDENTITY, ADD twice int NOT NULL GENERATED ALWAYS AS (total_tokens * 2) STORED"
    )
    with pytest.raises(NotInstalledError, match=r"ai_usage_log\.cost(?!.*(note|twice))"):
        set_up(host.engine, with_host_tables=False)
    host.execute("ALTER TABLE ai_usage_log ALTER cost SET DEFAULT 0")
    set_up(host.engine, with_host_tables=False)


WRONG_TYPES = {
    "ai_usage_log ALTER total_tokens TYPE numeric(12, 2)": r"total_tokens is numeric.*host\.usage_log\.total_tokens",
    "ai_usage_log ALTER created_at DROP DEFAULT, ALTER created_at TYPE date": r"created_at is date, where.*time zone",
    "ai_usage_log ALTER success DROP DEFAULT, ALTER success TYPE int USING 1": r"success is integer.*needs boolean",
    "ai_usage_log ALTER metadata DROP DEFAULT, ALTER metadata TYPE json": r"is json,.*metadata = \{value = \{\}\}",
    "ai_usage_log DROP CONSTRAINT ai_usage_log_user_id_fkey, ALTER user_id TYPE text": r"host\.user_id_type\.",
    "billing_subscription ALTER start_date TYPE text": r"start_date is text.*host\.subscription\.start_date",
    "billing_subscription ALTER tokens_remaining TYPE double precision": r"tokens_remaining is double precision",
    "billing_fullplan ALTER tokens_included TYPE numeric": r"billing_fullplan\.tokens_included is numeric",
}


@pytest.mark.parametrize("change", WRONG_TYPES)
def test_columns_that_could_not_be_counted_are_refused_by_name(host: Host, change: str) -> None:
    host.execute(f"ALTER TABLE {change}")
    with pytest.raises(NotInstalledError, match=rf"{WRONG_TYPES[change]}") as caught:
        set_up(host.engine, with_host_tables=False)
    assert "Nothing was changed." in str(caught.value)


def test_another_type_of_user_id_is_refused(host: Host) -> None:
    with pytest.raises(NotInstalledError, match=r"type bigint.*say text"):
        set_up(host.engine, HostMapping(user_id_type="text"), with_host_tables=False)


def test_a_busy_log_makes_the_setup_fail_soon_rather_than_queue_the_host(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.install.install.LOCK_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr("trueup.install.install.STATEMENT_TIMEOUT_SECONDS", 5)
    with locked(host, "LOCK TABLE ai_usage_log IN ROW EXCLUSIVE MODE"):
        with pytest.raises(OperationalError, match="lock timeout"):
            set_up(host.engine, with_host_tables=False)
        with impatient(host) as session:
            session.execute(text("SELECT * FROM ai_usage_log FOR UPDATE"))


def test_install_gives_up_before_a_deadlock_could_cancel_the_hosts_transaction(host: Host) -> None:
    """The host locks a subscription and waits for the log; install locks the log and needs the subscriptions."""
    user = host.subscriber()
    host.execute("DROP TRIGGER trueup_window_changed ON billing_subscription")
    with in_background() as submit, locked(host, "UPDATE billing_subscription SET tokens_remaining = 1") as session:
        setting_up = submit(lambda: set_up(host.engine, with_host_tables=False))
        wait_for_lock(host)
        session.execute(text("INSERT INTO ai_usage_log (user_id, section) VALUES (:user, 'chat')"), {"user": user})
        with pytest.raises(OperationalError, match="lock timeout"):
            setting_up.result()


def test_an_installer_waits_a_bounded_time_for_another(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueup.install.install.STATEMENT_TIMEOUT_SECONDS", 1)
    with (
        locked(host, "SELECT pg_advisory_xact_lock(:key)", key=INSTALL_LOCK),
        pytest.raises(OperationalError, match="statement timeout"),
    ):
        set_up(host.engine, with_host_tables=False)


def test_install_counts_a_recreated_log_again(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.log(user, 100)
    hold_tokens(connection, user, 0)
    host.execute(
        "CREATE TABLE copy (LIKE ai_usage_log INCLUDING ALL); DROP TABLE ai_usage_log; "
        "ALTER TABLE copy RENAME TO ai_usage_log"
    )
    host.log(user, 7)
    set_up(host.engine, with_host_tables=False)
    host.log(user, 30)
    assert_true(host)
    hold_tokens(connection, user, 963)
    assert_true(host)


def test_mapping_another_log_counts_that_one_and_leaves_the_old_one_alone(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.log(user, 100)
    hold_tokens(connection, user, 0)
    host.execute("CREATE TABLE new_log (LIKE ai_usage_log INCLUDING ALL)")
    mapping = HostMapping(usage_log=UsageLogTable(table="new_log"))
    set_up(host.engine, mapping, with_host_tables=False)
    host.log(user, 50)
    host.execute("INSERT INTO new_log (user_id, section, total_tokens) VALUES (:u, 'chat', 4)", u=user)
    assert_true(host, mapping)
    assert hold_tokens(connection, user, 996).tokens_left == 996
    host.log(user, 50)
    assert_true(host, mapping)


def test_mapping_another_column_of_the_same_log_counts_that_one(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    host.log(user, 100)
    hold_tokens(connection, user, 0)
    host.execute("UPDATE ai_usage_log SET prompt_tokens = 9")
    mapping = HostMapping(usage_log=UsageLogTable(total_tokens="prompt_tokens", prompt_tokens="total_tokens"))
    set_up(host.engine, mapping, with_host_tables=False)
    assert_true(host, mapping)
    assert hold_tokens(connection, user, 991).tokens_left == 991
    assert_true(host, mapping)


def test_a_database_set_up_for_another_mapping_is_not_ready(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed(connection)
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG__TABLE", "new_log")
    get_settings.cache_clear()
    with pytest.raises(NotInstalledError, match=r"other table or column names.*trueup db init"):
        check_installed(connection)


def test_rows_that_are_updated_often_have_space_on_their_pages(host: Host) -> None:
    options = host.execute(
        "SELECT relname, reloptions FROM pg_class WHERE oid IN ('trueup.balance'::regclass, 'trueup.hold'::regclass)"
    )
    assert {row.relname: row.reloptions for row in options} == {"balance": ["fillfactor=50"], "hold": ["fillfactor=50"]}
