from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import NOW, Host
from tests.support.sessions import locked_balance
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.errors import HoldOvertakenError, InvalidInputError
from trueup.gate.holds import Hold, close_hold, expire_holds
from trueup.gate.provider_calls import UnrecordedCall, begin_call, end_call, extend_hold, list_unrecorded_calls


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(1_000)


@pytest.fixture
def hold(connection: Connection, user: int) -> Hold:
    return hold_tokens(connection, user, 600, task="t", now=NOW)


def begin(connection: Connection, hold: Hold, bound: int, *, key: str = "1", minutes: float = 0) -> int | None:
    return begin_call(
        connection,
        hold,
        call_key=key,
        max_tokens=bound,
        lease_seconds=30,
        ttl_seconds=600,
        now=NOW + timedelta(minutes=minutes),
    )


def unrecorded(connection: Connection) -> list[tuple[str, int]]:
    return [(call.call_key, call.tokens_bound) for call in list_unrecorded_calls(connection)]


def on_record(host: Host) -> list[tuple[Any, ...]]:
    rows = host.execute("SELECT call_key, attempt, tokens_bound, outcome FROM trueup.call_intent ORDER BY 1, 2")
    return [tuple(row) for row in rows]


def test_a_calls_intent_is_recorded_before_the_call_and_removed_by_its_charge(
    host: Host, connection: Connection, hold: Hold
) -> None:
    assert begin(connection, hold, 600) is None
    assert on_record(host) == [("1", 1, 600, "started")]
    charge_tokens(connection, hold, 70, now=NOW)
    assert on_record(host) == []
    assert begin(connection, hold, 530, key="2") is None


def test_a_call_that_the_hold_does_not_cover_is_refused_with_the_tokens_left(
    host: Host, connection: Connection, hold: Hold
) -> None:
    charge_tokens(connection, hold, 100, key="0", now=NOW)
    assert begin(connection, hold, 501) == 500
    assert on_record(host) == []
    assert begin(connection, hold, 500) is None


def test_calls_at_the_same_time_share_the_hold(connection: Connection, hold: Hold) -> None:
    assert begin(connection, hold, 350) is None
    assert begin(connection, hold, 251, key="2") == 250
    assert begin(connection, hold, 250, key="2") is None
    assert begin(connection, hold, 1, key="3") == 0
    assert charge_tokens(connection, hold, 350, now=NOW).tokens_left == 0
    assert charge_tokens(connection, hold, 200, key="2", now=NOW).tokens_left == 50


def test_a_call_begun_again_counts_once_with_its_newer_bound(host: Host, connection: Connection, hold: Hold) -> None:
    """The caller repeats the request if the first answer was lost."""
    begin(connection, hold, 600)
    assert begin(connection, hold, 400) is None
    assert on_record(host) == [("1", 1, 400, "started")]
    assert begin(connection, hold, 200, key="2") is None


def test_the_intent_of_a_call_that_cost_nothing_is_deleted_and_its_tokens_are_free(
    host: Host, connection: Connection, hold: Hold
) -> None:
    begin(connection, hold, 600)
    end_call(connection, hold, call_key="1", unknown=False)
    assert on_record(host) == unrecorded(connection) == []
    assert begin(connection, hold, 600, key="2") is None


def test_a_call_with_an_unknown_outcome_is_listed_at_once_and_reserves_no_tokens(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    begin(connection, hold, 600)
    end_call(connection, hold, call_key="1", unknown=True)
    [call] = list_unrecorded_calls(connection)
    assert call == UnrecordedCall(user_id=user, task_id="t", call_key="1", tokens_bound=600, started_at=NOW)
    assert begin(connection, hold, 600, key="2") is None
    assert host.used(user) == 0  # possible usage is reported, but not recorded as usage
    assert_true(host)


def test_an_unknown_call_that_is_made_again_is_in_flight_again(connection: Connection, hold: Hold) -> None:
    begin(connection, hold, 600)
    end_call(connection, hold, call_key="1", unknown=True)
    assert begin(connection, hold, 400) is None
    assert unrecorded(connection) == []
    assert begin(connection, hold, 201, key="2") == 200


@pytest.mark.parametrize("unknown", [True, False])
def test_ending_a_call_leaves_other_calls_and_those_of_another_attempt_or_user_alone(
    host: Host, connection: Connection, hold: Hold, unknown: bool
) -> None:
    other = hold_tokens(connection, host.subscriber(), 600, task="t", now=NOW)
    for of in (hold, other):
        begin(connection, of, 100)
    second = hold_tokens(connection, hold.user_id, 600, task="t", lease=30, now=NOW + timedelta(minutes=1))
    begin(connection, second, 200, minutes=1)
    begin(connection, second, 50, key="2", minutes=1)
    end_call(connection, second, call_key="1", unknown=unknown)
    ended = [("1", 2, 200, "unknown")] if unknown else []
    assert on_record(host) == [("1", 1, 100, "started")] * 2 + ended + [("2", 2, 50, "started")]


@pytest.mark.parametrize("end", ["closed", "expired"])
def test_a_call_in_flight_is_listed_from_the_end_of_its_hold_until_its_charge(
    host: Host, connection: Connection, hold: Hold, end: str
) -> None:
    begin(connection, hold, 300)
    assert unrecorded(connection) == []
    if end == "closed":
        close_hold(connection, hold, now=NOW)
    else:
        expire_holds(connection, now=NOW + timedelta(hours=1))
    assert unrecorded(connection) == [("1", 300)]
    charge_tokens(connection, hold, 250, now=NOW + timedelta(hours=1))
    assert unrecorded(connection) == []
    assert_true(host)


@pytest.mark.parametrize("bound", [1, 200])
def test_the_calls_of_an_attempt_that_ended_are_unrecorded_though_its_hold_stays_open_for_a_slow_attempt(
    connection: Connection, user: int, hold: Hold, bound: int
) -> None:
    begin(connection, hold, bound)
    second = hold_tokens(connection, user, 600, task="t", now=NOW + timedelta(minutes=1))
    begin(connection, second, 100, key="own", minutes=1)
    assert close_hold(connection, second, now=NOW + timedelta(minutes=1)) == "open"
    assert unrecorded(connection) == [("own", 100)]


def test_unrecorded_calls_are_listed_newest_first(connection: Connection, hold: Hold) -> None:
    for minutes in (2, 1, 3):
        begin(connection, hold, minutes, key=f"after {minutes}", minutes=minutes)
    close_hold(connection, hold, now=NOW)
    assert unrecorded(connection) == [("after 3", 3), ("after 2", 2), ("after 1", 1)]
    assert len(list_unrecorded_calls(connection, limit=2)) == 2


@pytest.mark.parametrize("end", ["closed", "expired", "taken over", "never opened"])
def test_no_call_begins_without_an_open_hold_of_its_own_attempt(
    host: Host, connection: Connection, hold: Hold, end: str
) -> None:
    if end == "closed":
        close_hold(connection, hold, now=NOW)
    elif end == "expired":
        expire_holds(connection, now=NOW + timedelta(hours=1))
    elif end == "taken over":
        hold_tokens(connection, hold.user_id, 600, task="t", now=NOW)
    else:
        host.execute("TRUNCATE trueup.hold, trueup.balance")
    with pytest.raises(HoldOvertakenError, match="attempt 1 of task t"):
        begin(connection, hold, 0)
    assert on_record(host) == []


def test_a_call_is_begun_and_ended_while_the_balance_is_in_use(
    host: Host, connection: Connection, user: int, hold: Hold
) -> None:
    with locked_balance(host, user):
        assert begin(connection, hold, 100) is None
        end_call(connection, hold, call_key="1", unknown=False)


def test_without_an_injected_clock_a_call_renews_its_hold_by_the_databases_clock(
    host: Host, connection: Connection
) -> None:
    hold = hold_tokens(connection, host.subscriber(), 600)
    begin_call(connection, hold, call_key="1", max_tokens=1, lease_seconds=100, ttl_seconds=1_000)
    left = host.execute("SELECT lease_until - now() AS lease, expires_at - now() AS hold FROM trueup.hold").one()
    assert timedelta(seconds=90) < left.lease <= timedelta(seconds=100)
    assert timedelta(seconds=990) < left.hold <= timedelta(seconds=1_000)


def test_a_hold_is_extended_as_the_gate_would_admit(host: Host, connection: Connection, user: int, hold: Hold) -> None:
    host.log(user, 100)
    assert extend_hold(connection, hold, 301, now=NOW) == ("insufficient_tokens", 600)
    assert balance(host, user) == (100, 600)
    assert extend_hold(connection, hold, 300, now=NOW) == (None, 900)
    assert balance(host, user) == (100, 900)
    host.execute("UPDATE billing_subscription SET is_active = false")
    assert extend_hold(connection, hold, 0, now=NOW) == ("subscription_deactivated", 900)
    assert_true(host)


def test_an_extension_returns_the_tokens_left_without_those_of_calls_in_flight(
    connection: Connection, hold: Hold
) -> None:
    begin(connection, hold, 500)
    assert extend_hold(connection, hold, 50, now=NOW) == (None, 150)
    assert extend_hold(connection, hold, 5_000, now=NOW) == ("insufficient_tokens", 150)


@pytest.mark.parametrize(("end", "held"), [("closed", 0), ("overdue", 0), ("taken over", 600)])
def test_a_hold_that_has_ended_or_has_a_later_attempt_is_not_extended(
    host: Host, connection: Connection, user: int, hold: Hold, end: str, held: int
) -> None:
    if end == "closed":
        close_hold(connection, hold, now=NOW)
    elif end == "taken over":
        hold_tokens(connection, user, 600, task="t", now=NOW)
    with pytest.raises(HoldOvertakenError):
        extend_hold(connection, hold, 100, now=NOW + timedelta(hours=1) if end == "overdue" else NOW)
    assert balance(host, user) == (0, held)
    assert_true(host)


@pytest.mark.parametrize("tokens", [-1, True, 1.5, 2**63])
def test_a_malformed_extension_is_refused(connection: Connection, hold: Hold, tokens: Any) -> None:
    with pytest.raises(InvalidInputError, match="tokens"):
        extend_hold(connection, hold, tokens)
