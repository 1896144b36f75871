from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine

from tests.support.host import NOW, Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.gate.holds import Hold, close_hold, expire_holds
from trueup.gate.provider_calls import begin_call, end_call
from trueup.host.mapping import HostMapping
from trueup.monitoring.status import Status, read_status
from trueup.reconcile.local_run import reconcile
from trueup.usage.outbox import begin_effect, finish_effect

pytestmark = pytest.mark.dated


def before(**ago: float) -> Any:
    return NOW - timedelta(**ago)


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(1_000)


def begin(connection: Connection, hold: Hold, key: str, bound: int) -> None:
    begin_call(connection, hold, call_key=key, max_tokens=bound, lease_seconds=1, ttl_seconds=1, now=NOW)


def test_where_nothing_has_happened_there_are_zeros_and_no_times(connection: Connection) -> None:
    assert read_status(connection, hours=5, now=NOW) == Status(
        now=NOW,
        hours=5,
        open_holds=0,
        tokens_held=0,
        oldest_hold_seconds=None,
        expired_holds=0,
        charges=0,
        tokens_charged=0,
        late_charges=0,
        tokens_over_hold=0,
        settlement_lag_median_seconds=None,
        settlement_lag_p95_seconds=None,
        overdraft_users=0,
        overdraft_tokens=0,
        unrecorded_calls=0,
        unrecorded_tokens_bound=0,
        owed_charges=0,
        owed_tokens=0,
        charge_events=0,
        oldest_charge_event_seconds=None,
        unknown_effects=0,
        observed_denials=0,
        observed_denial_tokens=0,
        last_reconcile=None,
    )


def test_open_holds_are_counted_with_what_they_have_left_and_the_age_of_the_oldest(
    host: Host, connection: Connection, user: int
) -> None:
    old = hold_tokens(connection, user, 300, now=before(seconds=90))
    hold_tokens(connection, host.subscriber(), 50, now=before(seconds=30))
    close_hold(connection, hold_tokens(connection, user, 7, now=before(hours=9)), now=NOW)
    charge_tokens(connection, old, 100, now=NOW)
    status = read_status(connection, now=NOW)
    assert (status.open_holds, status.tokens_held, status.oldest_hold_seconds) == (2, 250, 90)


def test_expired_holds_of_the_last_hours_are_counted(connection: Connection, user: int) -> None:
    for hours in (1, 2, 5):
        hold_tokens(connection, user, 10, ttl=60, now=before(hours=hours, minutes=1))
        expire_holds(connection, now=before(hours=hours))
    assert [read_status(connection, hours=hours, now=NOW).expired_holds for hours in (1, 2, 4, 5)] == [1, 2, 2, 3]


def test_charges_of_the_last_hours_are_counted(connection: Connection, user: int) -> None:
    hold = hold_tokens(connection, user, 900, ttl=1_000_000, now=before(hours=30))
    for hours, tokens in ((25, 1), (24, 20), (1, 300)):
        charge_tokens(connection, hold, tokens, key=str(hours), now=before(hours=hours))
    day, longer = read_status(connection, now=NOW), read_status(connection, hours=48, now=NOW)
    assert (day.hours, day.charges, day.tokens_charged) == (24, 2, 320)
    assert (longer.charges, longer.tokens_charged) == (3, 321)
    assert (day.late_charges, day.tokens_over_hold) == (0, 0)


def test_late_charges_and_charges_over_their_hold_are_counted_separately(connection: Connection, user: int) -> None:
    overbilled, ended = hold_tokens(connection, user, 100, now=NOW), hold_tokens(connection, user, 100, now=NOW)
    close_hold(connection, ended, now=NOW)
    charge_tokens(connection, overbilled, 130, now=NOW)
    assert read_status(connection, now=NOW).late_charges == 0
    charge_tokens(connection, ended, 5, now=NOW)
    status = read_status(connection, now=NOW)
    assert (status.late_charges, status.tokens_over_hold) == (1, 35)


def test_the_settlement_lag_is_from_opening_a_hold_to_charging_it(connection: Connection, user: int) -> None:
    for seconds in range(1, 11):
        hold = hold_tokens(connection, user, 10, now=before(seconds=seconds))
        charge_tokens(connection, hold, 1, now=NOW)
    gone = hold_tokens(connection, user, 10, now=before(hours=10))
    close_hold(connection, gone, now=NOW)
    charge_tokens(connection, gone, 1, now=NOW)  # charged without a hold, so it has no lag
    status = read_status(connection, now=NOW)
    assert (status.settlement_lag_median_seconds, status.settlement_lag_p95_seconds) == (5.5, pytest.approx(9.55))


def test_the_overdraft_is_the_usage_beyond_the_budget(host: Host, connection: Connection, user: int) -> None:
    other, exact = host.subscriber(500), host.subscriber(100)
    for of, budget, billed in ((user, 1_000, 1_250), (other, 500, 501), (exact, 100, 100)):
        charge_tokens(connection, hold_tokens(connection, of, budget, now=NOW), billed, now=NOW)
    status = read_status(connection, now=NOW)
    assert (status.overdraft_users, status.overdraft_tokens) == (2, 251)
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_at) VALUES (:user, 200, 'top-up', :now)",
        user=user,
        now=NOW,
    )
    assert read_status(connection, now=NOW).overdraft_tokens == 51


@pytest.mark.parametrize(
    "change", ["TRUNCATE ai_usage_log", "UPDATE billing_subscription SET start_date = start_date + interval '9 days'"]
)
def test_a_stale_balance_is_not_an_overdraft(host: Host, connection: Connection, user: int, change: str) -> None:
    charge_tokens(connection, hold_tokens(connection, user, 1_000, now=NOW), 1_250, now=NOW)
    assert read_status(connection, now=NOW).overdraft_users == 1
    host.execute(change)
    assert read_status(connection, now=NOW).overdraft_users == 0


def test_calls_that_were_never_recorded_are_counted_as_they_are_listed(connection: Connection, user: int) -> None:
    dead, alive = hold_tokens(connection, user, 300, now=NOW), hold_tokens(connection, user, 300, now=NOW)
    begin(connection, dead, "1", 120)
    begin(connection, alive, "in flight", 100)
    begin(connection, alive, "unknown", 30)
    end_call(connection, alive, call_key="unknown", unknown=True)
    close_hold(connection, dead, now=NOW)
    status = read_status(connection, now=NOW)
    assert (status.unrecorded_calls, status.unrecorded_tokens_bound) == (2, 150)


def test_effects_that_may_have_happened_are_counted(connection: Connection, user: int) -> None:
    for effect, status in (("a", "unknown"), ("b", "unknown"), ("c", "sent"), ("d", "failed"), ("e", "sending")):
        begun = begin_effect(connection, user_id=user, task_id="t", effect=effect, detail={})
        finish_effect(connection, begun, status)  # type: ignore[arg-type]
    assert read_status(connection, now=NOW).unknown_effects == 2


def test_the_last_reconcile_that_finished_is_named(host: Host, connection: Connection, database: str) -> None:
    engine = create_engine(database)
    runs = [reconcile(engine, HostMapping()) for _ in range(3)]
    engine.dispose()
    host.execute("UPDATE trueup.reconcile_run SET status = 'failed' WHERE id = :id", id=runs[2].run_id)
    assert read_status(connection).last_reconcile == runs[1].finished_at


def test_without_an_injected_clock_the_databases_counts(connection: Connection, user: int) -> None:
    hold_tokens(connection, user, 10)
    age = read_status(connection).oldest_hold_seconds
    assert age is not None
    assert 0 <= age < 60
