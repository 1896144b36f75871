"""Hosts with books of their own: a trigger that lowers the counter, or a tracker that logs each call."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.mapped import NO_AGE, Remap
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import get_engine
from trueup.doctor.invariants import check_owed_charges
from trueup.errors import NotInstalledError, TokensDenied
from trueup.gate.holds import close_hold
from trueup.gate.owed_charges import list_owed_charges, settle_owed_charges
from trueup.host.catalog import host_triggers
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings
from trueup.usage.tracker import track_ai_usage

KEPT_BY_HOST = "[host.subscription]\ncounter_kept_by = 'host'"
RECORDED_BY_HOST = "[host.usage_log]\nrecord = 'host'"
LOWERS = """
    CREATE FUNCTION lower_it() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE billing_subscription SET tokens_remaining = tokens_remaining - NEW.total_tokens
        WHERE user_id = NEW.user_id;
        RETURN NULL;
    END $$;
    CREATE TRIGGER lowers_it AFTER INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION lower_it();
"""


def log_now(host: Host, user: int, tokens: int) -> None:
    host.log(user, tokens, at=datetime.now(UTC))
    host.decrement(user, tokens)


def test_a_trigger_that_lowers_the_counter_is_found_at_setup(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    user = host.subscriber(10_000)
    with pytest.raises(NotInstalledError, match="went from 10000 to 9998 when a row"):
        remap("", LOWERS)
    assert host.counter(user) == 10_000
    assert host.used(user) == 0
    assert host_triggers(connection, HostMapping()) == [
        "lowers_it on ai_usage_log: its function names tokens_remaining"
    ]
    remap("[host.subscription]\ncounter_kept_by = 'trueup'")


def test_a_counter_that_the_host_keeps_is_lowered_once_for_each_call(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(KEPT_BY_HOST, LOWERS)
    user = host.subscriber(10_000)
    for number in range(3):
        track_ai_usage(user, section="chat", prompt_tokens=60, completion_tokens=40, model_name="m", key=str(number))
    assert host.counter(user) == 9_700
    hold = hold_tokens(connection, user, 1_000)
    charge_tokens(connection, hold, 500)
    assert close_hold(connection, hold) == "settled"
    assert host.counter(user) == 9_200
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0
    assert_true(host, mapping)


def test_an_owed_charge_reaches_a_counter_that_the_host_keeps_with_its_row(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(KEPT_BY_HOST, LOWERS)
    user = host.subscriber(1_000)
    host.execute("ALTER TABLE ai_usage_log ADD CONSTRAINT small CHECK (total_tokens < 100)")
    assert charge_tokens(connection, hold_tokens(connection, user, 300), 200).recorded
    assert (host.counter(user), read_account(connection, user).consumed) == (1_000, 200)
    host.execute("ALTER TABLE ai_usage_log DROP CONSTRAINT small")
    assert settle_owed_charges(connection) == (1, 0)
    assert host.counter(user) == 800
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0


def test_a_call_that_the_host_logs_is_held_capped_and_counted_once(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(RECORDED_BY_HOST)
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 600)
    charge_tokens(connection, hold, 250)
    charge_tokens(connection, hold, 250, key="2")
    assert host.value("SELECT count(*) FROM ai_usage_log") == 0
    # The calls count before the host has logged them, and only once afterwards.
    assert close_hold(connection, hold) == "settled"
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 501)
    assert [one.tokens for one in list_owed_charges(connection)] == [250, 250]
    for _ in range(2):
        log_now(host, user, 250)
    assert close_hold(connection, hold_tokens(connection, user, 500)) == "released"
    assert list_owed_charges(connection) == []
    account = read_account(connection, user)
    assert (account.consumed, account.drift, host.counter(user)) == (500, 0, 500)
    rows = host.execute("SELECT id::text FROM ai_usage_log").scalars().all()
    assert set(host.execute("SELECT log_id FROM trueup.charge").scalars()) == set(rows)
    run = reconcile(get_engine(), mapping, rules=NO_AGE, kind="deep")
    assert (run.drifted, run.defects) == (0, 0)
    assert_true(host, mapping)


def test_a_row_that_the_host_writes_before_the_charge_is_the_charges_row(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(RECORDED_BY_HOST)
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 600)
    log_now(host, user, 40)
    log_now(host, user, 300)
    charge_tokens(connection, hold, 300)
    assert list_owed_charges(connection) == []
    assert (read_account(connection, user).consumed, read_account(connection, user).held) == (340, 300)
    assert_true(host, mapping)


def test_a_row_that_is_older_than_the_call_is_not_its_row(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap(RECORDED_BY_HOST)
    user = host.subscriber(1_000)
    host.log(user, 300, at=datetime.now(UTC) - timedelta(minutes=1))
    charge_tokens(connection, hold_tokens(connection, user, 600), 300)
    assert read_account(connection, user).consumed == 600
    host.log(user, 300, at=datetime.now(UTC))
    hold_tokens(connection, user, 10)
    assert (list_owed_charges(connection), read_account(connection, user).consumed) == ([], 600)


def test_doctor_names_calls_that_the_host_never_logs(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap(RECORDED_BY_HOST)
    user = host.subscriber(1_000)
    charge_tokens(connection, hold_tokens(connection, user, 600), 300)
    assert [one.level for one in check_owed_charges(connection, get_settings())] == ["ok"]
    host.execute("UPDATE trueup.owed_charge SET owed_since = owed_since - interval '1 hour'")
    [found] = check_owed_charges(connection, get_settings())
    assert (found.level, found.detail) == ("warning", {"charges": 1, "tokens": 300})


def test_a_row_of_other_size_is_the_calls_after_ten_minutes(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap(RECORDED_BY_HOST)
    user = host.subscriber(1_000)
    ago = datetime.now(UTC) - timedelta(minutes=20)
    charge_tokens(connection, hold_tokens(connection, user, 600), 300, now=ago)
    host.log(user, 290, at=ago + timedelta(seconds=2))
    hold_tokens(connection, user, 10)
    assert (list_owed_charges(connection), read_account(connection, user).consumed) == ([], 290)


def test_the_counter_of_a_user_whose_row_is_awaited_is_not_corrected(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(RECORDED_BY_HOST)
    user = host.subscriber(1_000)
    charge_tokens(connection, hold_tokens(connection, user, 600), 300)
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0
    assert host.counter(user) == 1_000
    # The host has lost the call: after an hour, the drift is reported.
    host.execute("UPDATE trueup.owed_charge SET used_at = used_at - interval '2 hours'")
    assert reconcile(get_engine(), mapping, rules=NO_AGE).in_review == 1
    assert host.counter(user) == 1_000
