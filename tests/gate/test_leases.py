"""Two attempts of one task: which attempt has the hold, what each may spend, and which work is done only once."""

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import NOW, Host, after
from tests.support.work import OWNER, balance, charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.errors import HoldBusyError, HoldOvertakenError, TokensDenied
from trueup.gate.holds import (
    Hold,
    abandon_calls,
    close_abandoned_hold,
    close_hold,
    expire_holds,
    has_later_attempt,
    list_holds,
)
from trueup.gate.provider_calls import begin_call, extend_hold, list_unrecorded_calls

LEASE = 30


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(1_000)


def deliver(connection: Connection, user: int, seconds: float = 0, *, tokens: int = 600, retries: int = 0) -> Hold:
    """Deliver the task `t` that long after NOW."""
    return hold_tokens(connection, user, tokens, task="t", lease=LEASE, ttl=600, retries=retries, now=after(seconds))


def begin(connection: Connection, hold: Hold, bound: int, seconds: float = 0, *, key: str = "1") -> int | None:
    return begin_call(
        connection,
        hold,
        call_key=key,
        max_tokens=bound,
        lease_seconds=LEASE,
        ttl_seconds=600,
        now=after(seconds),
    )


def redo(connection: Connection, user: int, how: str) -> Hold:
    """Complete the work, replay it, end the replay as `how` says, and deliver the task once more."""
    close_hold(connection, deliver(connection, user), completed=True, now=NOW)
    replay = deliver(connection, user)
    if how == "its body failed":
        close_hold(connection, replay, now=NOW)
    elif how == "its worker died":
        expire_holds(connection, now=after(600))
        return deliver(connection, user, 600)
    elif how == "it was abandoned":
        close_abandoned_hold(connection, user, "t", owner=OWNER, now=NOW)
    return deliver(connection, user, LEASE, retries=1 if how == "it asked for a retry" else 0)


ENDS_OF_A_REPLAY = [
    "its body failed",
    "its worker died",
    "it was abandoned",
    "it is still open",
    "it asked for a retry",
]


def test_while_an_attempt_has_its_lease_a_duplicate_gets_the_time_to_try_again(
    host: Host, connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    with pytest.raises(HoldBusyError) as busy:
        deliver(connection, user, 20)
    assert (busy.value.seconds, busy.value.redundant) == (LEASE - 20, False)
    assert begin(connection, first, 600, 20) is None
    assert_true(host)


def test_a_second_waiting_duplicate_is_redundant(connection: Connection, user: int) -> None:
    deliver(connection, user)
    redundant = []
    for seconds in (1, 2, LEASE - 1):
        with pytest.raises(HoldBusyError) as busy:
            deliver(connection, user, seconds)
        redundant.append(busy.value.redundant)
    assert redundant == [False, True, True]
    assert deliver(connection, user, LEASE).attempt == 2


def test_a_duplicate_waits_for_a_minute_at_most_and_then_another_one_may_wait(
    connection: Connection, user: int
) -> None:
    hold_tokens(connection, user, 600, task="t", lease=300, now=NOW)
    waits = []
    for seconds in (1, 60, 61):
        with pytest.raises(HoldBusyError) as busy:
            hold_tokens(connection, user, 600, task="t", lease=300, now=after(seconds))
        waits.append((busy.value.seconds, busy.value.redundant))
    assert waits == [(60, False), (60, True), (60, False)]


@pytest.mark.parametrize("retries", [0, 1])
def test_the_lease_ends_to_the_moment_and_for_a_retry_at_once(connection: Connection, user: int, retries: int) -> None:
    deliver(connection, user)
    later = deliver(connection, user, 0 if retries else LEASE, retries=retries)
    assert (later.attempt, later.reattached, later.tokens_left) == (2, True, 600)


def test_a_call_renews_the_lease_and_the_hold(connection: Connection, user: int) -> None:
    first = deliver(connection, user)
    begin(connection, first, 10, 25)
    with pytest.raises(HoldBusyError) as busy:
        deliver(connection, user, 40)
    assert busy.value.seconds == 15
    [row] = list_holds(connection)
    assert row.expires_at == after(25 + 600)


def test_a_call_never_shortens_a_lease(connection: Connection, user: int) -> None:
    first = deliver(connection, user)
    values = {"lease_seconds": 1, "ttl_seconds": 1, "now": NOW}
    begin_call(connection, first, call_key="1", max_tokens=1, **values)
    with pytest.raises(HoldBusyError):
        deliver(connection, user, LEASE - 1)
    assert list_holds(connection)[0].expires_at == after(600)


def test_a_call_before_the_sweep_saves_an_overdue_hold(host: Host, connection: Connection, user: int) -> None:
    first = deliver(connection, user)
    assert begin(connection, first, 100, 601) is None
    assert expire_holds(connection, now=after(602)) == (0, 0)
    expire_holds(connection, now=after(2_000))
    with pytest.raises(HoldOvertakenError):
        begin(connection, first, 100, 2_001)
    assert_true(host)


def test_an_overtaken_attempt_can_only_record_its_usage(host: Host, connection: Connection, user: int) -> None:
    first = deliver(connection, user)
    deliver(connection, user, LEASE)
    with pytest.raises(HoldOvertakenError):
        begin(connection, first, 1, LEASE)
    with pytest.raises(HoldOvertakenError):
        extend_hold(connection, first, 1, now=after(LEASE))
    assert close_hold(connection, first) is None
    assert charge_tokens(connection, first, 100, now=after(LEASE)).late
    assert balance(host, user) == (100, 500)
    assert_true(host)


def test_tokens_of_a_slow_attempts_call_in_flight_are_withheld_from_the_next_attempt(
    host: Host, connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    begin(connection, first, 400)
    hold_tokens(connection, user, 1, now=NOW)
    second = deliver(connection, user, LEASE)
    assert second.tokens_left == 200
    assert begin(connection, second, 201, LEASE) == begin(connection, second, 201, LEASE, key="2") == 200
    assert begin(connection, second, 200, LEASE, key="2") is None
    assert charge_tokens(connection, second, 200, key="2", now=after(LEASE)).tokens_over == 0
    assert charge_tokens(connection, first, 400, now=after(LEASE)).tokens_over == 0
    assert balance(host, user) == (600, 1)
    assert_true(host)


@pytest.mark.parametrize("tokens", [300, 1])
def test_the_next_attempt_gets_the_withheld_tokens_again_if_the_budget_allows(
    host: Host, connection: Connection, tokens: int
) -> None:
    """Otherwise a task whose worker died in a call for its whole hold could never continue."""
    user = host.subscriber(3 * tokens)
    attempts = []
    for number, times in enumerate([1, 2, 3, 3]):
        attempts.append(deliver(connection, user, number * LEASE, tokens=tokens))
        left = tokens if number < 3 else 0
        assert (attempts[-1].tokens_left, balance(host, user)) == (left, (0, times * tokens))
        begin(connection, attempts[-1], tokens, number * LEASE)
    for slow in attempts[:3]:
        assert charge_tokens(connection, slow, tokens, now=after(3 * LEASE)).tokens_over == 0
    assert balance(host, user) == (3 * tokens, 0)
    assert_true(host)


def test_tokens_of_a_dead_attempts_call_are_free_for_its_retry_and_the_call_is_listed(
    connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    begin(connection, first, 400)
    abandon_calls(connection, user, "t", owner=OWNER)
    retry = deliver(connection, user, 1, retries=1)
    assert retry.tokens_left == 600
    assert [call.tokens_bound for call in list_unrecorded_calls(connection)] == [400]
    assert charge_tokens(connection, first, 300, now=after(2)).late  # it lived after all
    assert list_unrecorded_calls(connection) == []


def test_a_retry_of_the_second_attempt_keeps_the_call_of_a_slow_first_attempt_covered(
    host: Host, connection: Connection, user: int
) -> None:
    """Three attempts: the first is slow, and the worker that saw the second die sent the third."""
    first = deliver(connection, user)
    begin(connection, first, 400)
    hold_tokens(connection, user, 1, now=NOW)
    hold_tokens(connection, host.subscriber(), 1, task="t", now=NOW)
    second = deliver(connection, user, LEASE)
    begin(connection, second, 150, LEASE, key="2")
    abandon_calls(connection, user, "t", owner=OWNER)
    third = deliver(connection, user, LEASE + 1, retries=1)
    assert third.tokens_left == 200
    assert [call.call_key for call in list_unrecorded_calls(connection)] == ["2"]
    charge_tokens(connection, third, 200, key="3", now=after(LEASE + 2))
    assert charge_tokens(connection, first, 400, now=after(LEASE + 2)).tokens_over == 0
    assert_true(host)


def test_a_new_hold_does_not_cover_the_calls_of_the_hold_that_ended(
    host: Host, connection: Connection, user: int
) -> None:
    """Their tokens were released. Otherwise a task whose worker died in a call could never continue."""
    first = deliver(connection, user)
    begin(connection, first, 600)
    expire_holds(connection, now=after(1_200))
    second = deliver(connection, user, 1_201)
    assert (second.attempt, second.reattached, second.tokens_left) == (2, False, 600)
    assert begin(connection, second, 600, 1_201) is None
    assert [call.tokens_bound for call in list_unrecorded_calls(connection)] == [600]
    assert_true(host)


def test_two_attempts_that_buy_the_same_call_are_both_recorded_and_each_once(
    host: Host, connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    begin(connection, first, 200)
    second = deliver(connection, user, LEASE)
    begin(connection, second, 200, LEASE)
    for hold in (second, first, second, first):
        charge_tokens(connection, hold, 200, now=after(LEASE))
    assert balance(host, user) == (400, 400)
    keys = host.execute("SELECT call_key, attempt FROM trueup.charge ORDER BY 1").all()
    assert [tuple(key) for key in keys] == [("1", 2), ("1~1", 1)]
    assert host.value("SELECT count(*) FROM trueup.call_intent") == 0
    assert_true(host)


def test_a_task_whose_work_is_done_is_replayed_without_tokens_and_without_the_gate(
    host: Host, connection: Connection, user: int
) -> None:
    close_hold(connection, deliver(connection, user), completed=True)
    host.execute("UPDATE billing_subscription SET is_active = false")
    host.log(user, 5_000)
    replay = deliver(connection, user, 1)
    assert (replay.replay, replay.reattached, replay.tokens_left) == (True, False, 0)
    assert begin(connection, replay, 1, 1) == 0
    assert_true(host)


def test_a_task_that_failed_after_spending_passes_the_gate_again(connection: Connection, user: int) -> None:
    close_hold(connection, deliver(connection, user), completed=False)
    assert not deliver(connection, user).replay


def test_work_that_is_done_is_not_bought_again_for_a_retry_after_a_lost_process(
    host: Host, connection: Connection, user: int
) -> None:
    """The process was lost between the end of its body and the acknowledgement: Celery counts that as a retry."""
    close_hold(connection, deliver(connection, user), completed=True)
    again = deliver(connection, user, retries=1)
    assert (again.replay, again.tokens_left) == (True, 0)
    assert balance(host, user) == (0, 0)


@pytest.mark.parametrize("how", ENDS_OF_A_REPLAY)
def test_work_that_is_done_stays_done_however_its_replay_ends(
    host: Host, connection: Connection, user: int, how: str
) -> None:
    again = redo(connection, user, how)
    assert (again.replay, again.tokens_left) == (True, 0)
    assert balance(host, user) == (0, 0)
    assert_true(host)


def test_a_replay_that_extends_its_hold_gets_no_tokens(host: Host, connection: Connection, user: int) -> None:
    close_hold(connection, deliver(connection, user), completed=True)
    replay = deliver(connection, user)
    assert extend_hold(connection, replay, 400, now=NOW) == (None, 0)
    assert extend_hold(connection, replay, 4_000, now=NOW) == (None, 0)
    assert balance(host, user) == (0, 0)
    assert_true(host)


def overtaken_in_a_call(connection: Connection, user: int, bound: int) -> tuple[Hold, Hold]:
    """Return a first attempt that is still in a call, and the second attempt, which has the hold."""
    first = deliver(connection, user)
    begin(connection, first, bound)
    return first, deliver(connection, user, LEASE)


def test_tokens_of_a_slow_attempts_call_in_flight_stay_held_when_the_next_attempt_ends(
    host: Host, connection: Connection, user: int
) -> None:
    first, second = overtaken_in_a_call(connection, user, 400)
    assert close_hold(connection, second, completed=True, now=after(LEASE)) == "open"
    assert balance(host, user) == (0, 400)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 601, now=after(LEASE))
    charge_tokens(connection, hold_tokens(connection, user, 600, now=after(LEASE)), 600, now=after(LEASE))
    late = charge_tokens(connection, first, 400, now=after(LEASE + 1))
    assert (late.late, late.tokens_over, late.tokens_left) == (True, 0, 0)
    assert balance(host, user) == (1_000, 0)
    assert host.value("SELECT status FROM trueup.hold WHERE task_id = 't'") == "settled"
    assert_true(host)


def test_a_hold_that_is_open_only_for_calls_in_flight_ends_with_the_last_one_and_allows_no_new_call(
    host: Host, connection: Connection, user: int
) -> None:
    first, second = overtaken_in_a_call(connection, user, 200)
    begin(connection, second, 100, LEASE)
    third = deliver(connection, user, 2 * LEASE)
    close_hold(connection, third, now=after(2 * LEASE))
    assert balance(host, user) == (0, 300)
    assert close_hold(connection, third, now=after(2 * LEASE)) is None
    with pytest.raises(HoldOvertakenError):
        begin(connection, third, 1, 2 * LEASE)
    with pytest.raises(HoldOvertakenError):
        extend_hold(connection, third, 1, now=after(2 * LEASE))
    own = charge_tokens(connection, third, 50, key="own", now=after(2 * LEASE))
    assert (own.late, own.tokens_over) == (True, 50)
    charge_tokens(connection, first, 150, now=after(2 * LEASE))
    assert balance(host, user) == (200, 100)
    charge_tokens(connection, second, 120, now=after(2 * LEASE))
    assert balance(host, user) == (320, 0)
    [row] = list_holds(connection, every_status=True)
    assert (row.status, row.tokens_charged, row.calls) == ("settled", 320, 3)
    assert_true(host)


@pytest.mark.parametrize(
    ("completed", "retries", "tokens"), [(True, 0, 0), (True, 1, 0), (False, 0, 600), (False, 1, 600)]
)
def test_a_redelivered_task_passes_the_gate_if_its_hold_is_open_only_for_calls_in_flight(
    host: Host, connection: Connection, user: int, completed: bool, retries: int, tokens: int
) -> None:
    first, second = overtaken_in_a_call(connection, user, 400)
    close_hold(connection, second, completed=completed, now=after(LEASE))
    again = deliver(connection, user, LEASE, retries=retries)
    assert (again.attempt, again.replay, again.tokens_left) == (3, tokens == 0, tokens)
    assert balance(host, user) == (0, 400 + tokens)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 601 - tokens, now=after(LEASE))
    charge_tokens(connection, first, 400, now=after(LEASE))
    assert close_hold(connection, again, completed=True, now=after(LEASE)) == "settled"
    assert balance(host, user) == (400, 0)
    assert_true(host)


def test_a_task_that_is_denied_another_attempt_leaves_calls_in_flight_covered(
    host: Host, connection: Connection, user: int
) -> None:
    _, second = overtaken_in_a_call(connection, user, 500)
    close_hold(connection, second, now=after(LEASE))
    with pytest.raises(TokensDenied):
        deliver(connection, user, LEASE)
    assert balance(host, user) == (0, 500)
    assert expire_holds(connection, now=after(2 * (LEASE + 600) - 1)) == (0, 0)
    assert expire_holds(connection, now=after(2 * (LEASE + 600))) == (1, 500)
    assert_true(host)


def test_the_tokens_of_a_call_in_flight_outlive_their_hold_once(host: Host, connection: Connection, user: int) -> None:
    """A frozen process may still return from a call, so no other task gets the call's maximum cost."""
    first = deliver(connection, user)
    begin(connection, first, 400)
    assert read_account(connection, user, now=after(600)).held == 400
    assert expire_holds(connection, now=after(600)) == (0, 200)
    assert balance(host, user) == (0, 400)
    with pytest.raises(HoldOvertakenError):
        begin(connection, first, 10, 601, key="2")
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 601, task="other", now=after(601))
    other = hold_tokens(connection, user, 600, task="other", now=after(601))
    charge_tokens(connection, other, 600, now=after(601))
    late = charge_tokens(connection, first, 400, now=after(1_199))
    assert (late.late, late.tokens_over) == (True, 0)
    account = read_account(connection, user, now=after(1_199))
    assert (account.consumed, account.held) == (account.original, 0)
    assert [row.status for row in list_holds(connection, every_status=True)] == ["open", "settled"]
    assert_true(host)


def test_a_retry_leaves_the_call_of_another_delivery_covered(host: Host, connection: Connection, user: int) -> None:
    """The attempt that asked for the retry does not have the hold: another attempt has it, and is in a call."""
    deliver(connection, user, tokens=900)
    alive = deliver(connection, user, LEASE, tokens=900)
    begin(connection, alive, 700, LEASE)
    retry = deliver(connection, user, LEASE + 1, tokens=900, retries=1)
    assert retry.tokens_left == 200
    assert begin(connection, retry, 200, LEASE + 1) is None
    charge_tokens(connection, retry, 200, now=after(LEASE + 2))
    late = charge_tokens(connection, alive, 700, key="2", now=after(LEASE + 2))
    assert (late.late, late.tokens_over) == (True, 0)
    assert_true(host)


def test_the_death_of_an_attempt_that_lost_its_hold_does_not_affect_the_holds_owner(
    host: Host, connection: Connection, user: int
) -> None:
    alive = deliver(connection, user)
    begin(connection, alive, 400)
    abandon_calls(connection, user, "t", owner="test:2")
    assert close_abandoned_hold(connection, user, "t", owner="test:2", now=NOW) is None
    assert list_unrecorded_calls(connection) == []
    assert begin(connection, alive, 201, key="2") == 200
    assert close_abandoned_hold(connection, user, "t", owner=OWNER, now=NOW) == "released"
    assert_true(host)


def test_a_gate_treats_a_call_in_flight_past_its_hold_as_the_sweep_does(
    host: Host, connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    begin(connection, first, 400)
    other = hold_tokens(connection, user, 600, task="other", now=after(601))
    assert balance(host, user) == (0, 1_000)
    assert list_unrecorded_calls(connection) == []
    close_hold(connection, other, now=after(601))
    assert read_account(connection, user, now=after(1_199)).held == 400
    assert read_account(connection, user, now=after(1_200)).held == 0
    assert expire_holds(connection, now=after(1_200)) == (1, 400)
    assert [call.tokens_bound for call in list_unrecorded_calls(connection)] == [400]
    assert_true(host)


def test_a_task_delivered_after_its_hold_ran_out_passes_the_gate_beside_its_call_in_flight(
    host: Host, connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    begin(connection, first, 400)
    second = deliver(connection, user, 601)
    assert (second.attempt, second.reattached, second.tokens_left) == (2, True, 600)
    assert balance(host, user) == (0, 1_000)
    charge_tokens(connection, first, 400, now=after(602))
    close_hold(connection, second, now=after(603))
    assert balance(host, user) == (400, 0)
    assert_true(host)


def test_a_charge_after_the_expiry_of_its_hold_exceeds_the_budget_by_at_most_its_maximum_cost(
    host: Host, connection: Connection, user: int
) -> None:
    """Only this exceeds a budget without the provider's fault: a process that is frozen in a call for two periods."""
    first = deliver(connection, user)
    begin(connection, first, 400)
    other = hold_tokens(connection, user, 1_000, now=after(1_201))
    charge_tokens(connection, other, 1_000, now=after(1_201))
    late = charge_tokens(connection, first, 400, now=after(1_202))
    assert (late.late, late.tokens_over) == (True, 400)
    account = read_account(connection, user, now=after(1_202))
    assert account.consumed - account.original == 400
    assert_true(host)


def test_an_attempt_learns_whether_a_later_one_was_admitted(host: Host, connection: Connection, user: int) -> None:
    for other, task in ((user, "u"), (host.subscriber(), "t")):
        for _ in "12":
            hold_tokens(connection, other, 10, task=task, now=NOW)
    first = deliver(connection, user)
    assert has_later_attempt(connection, first) is False
    second = deliver(connection, user, LEASE)
    assert [has_later_attempt(connection, hold) for hold in (first, second)] == [True, False]
