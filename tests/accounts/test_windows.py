"""Windows and grants: a grant pays only for usage beyond a plan, whether or not trueup saw the window in time."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.accounts.test_grants import DAY, PLAN, give, original, renew
from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.sessions import in_background, run_at_once, wait_for_lock
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import grant_tokens, list_grants, revoke_grant
from trueup.database.engine import connect, get_engine
from trueup.host.fields import SubscriptionTable
from trueup.host.mapping import HostMapping
from trueup.install.baseline import SAVE_BASELINE
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile

pytestmark = pytest.mark.dated

HOUR = timedelta(hours=1)
LARGE, SMALL = 5_000, 500


def subscribe_to(host: Host, tokens: int, at: datetime | None = None) -> None:
    """Change the plan at the time `at`."""
    host.execute("UPDATE billing_subscription SET token_plan_id = :plan", plan=host.plan(tokens))
    if at is not None:
        host.date_change(at)


def look(connection: Connection, user: int, now: datetime) -> None:
    """Read the account as a gate does, without a decision."""
    connection.execute(text("SELECT trueup.lock_and_store(:user, :now)"), {"user": user, "now": now})


def assert_adds(host: Host, connection: Connection, user: int, expected: int, now: datetime) -> None:
    """Check the tokens that grants add, before and after the settlement."""
    for _ in range(3):
        plan = host.value(
            "SELECT p.tokens_included FROM billing_tokenplan p "
            "JOIN billing_subscription s ON s.token_plan_id = p.id WHERE s.user_id = :user",
            user=user,
        )
        assert original(connection, user, now) - plan == expected
        look(connection, user, now)
    assert_true(host)


def test_each_window_between_two_reads_is_compared_with_its_own_plan(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    for days in (30, 60, 90):
        host.log(user, 900, at=START + (days - 10) * DAY)
        renew(host, START + days * DAY)
    assert_adds(host, connection, user, 500, START + 90 * DAY)


def test_usage_beyond_the_plan_counts_in_each_window_between_two_reads(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    for days, tokens in ((30, 1_100), (60, 400), (90, 1_250)):
        host.log(user, tokens, at=START + (days - 10) * DAY)
        renew(host, START + days * DAY)
    assert_adds(host, connection, user, 150, START + 90 * DAY)
    uses = host.execute("SELECT window_start, tokens FROM trueup.grant_use ORDER BY 1").all()
    assert uses == [(START, 100), (START + 60 * DAY, 250)]


def test_windows_between_two_reads_keep_their_plans_between_two_reads(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 900, at=START + DAY)
    for days, plan in ((30, LARGE), (60, SMALL)):
        subscribe_to(host, plan, at=START + days * DAY)
        renew(host, START + days * DAY)
        host.log(user, 4_000 if plan == LARGE else 520, at=START + days * DAY + HOUR)
    renew(host, START + 90 * DAY)
    assert_adds(host, connection, user, 480, START + 90 * DAY)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_window_that_moves_back_and_forth_uses_no_grant_twice(
    host: Host, connection: Connection, noticed: bool
) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_100, at=START + 5 * DAY)
    now = START + 30 * DAY
    for days in (30, 0, 30, 10, 30, 0, 30):
        renew(host, START + days * DAY)
        if noticed:
            look(connection, user, now)
    assert_adds(host, connection, user, 400, now)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_renewal_that_was_undone_has_no_effect(host: Host, connection: Connection, noticed: bool) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    for days in (5, 25):
        host.log(user, 700, at=START + days * DAY)
    for days in (20, 0, 30):
        renew(host, START + days * DAY)
        if noticed:
            look(connection, user, START + 30 * DAY)
    assert_adds(host, connection, user, 100, START + 30 * DAY)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_renewal_corrected_to_an_earlier_day_keeps_its_usage(
    host: Host, connection: Connection, noticed: bool
) -> None:
    """The usage of the days between belongs to the new window, and no longer to the previous one."""
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 900, at=START + 5 * DAY)
    host.log(user, 300, at=START + 25 * DAY)
    renew(host, START + 30 * DAY)
    if noticed:
        look(connection, user, START + 30 * DAY)
        assert original(connection, user, START + 30 * DAY) == PLAN + 300
    renew(host, START + 20 * DAY)
    assert_adds(host, connection, user, 500, START + 31 * DAY)
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 500, START + 31 * DAY)


@pytest.mark.parametrize("window_first", [False, True])
@pytest.mark.parametrize(("before", "after"), [(PLAN, LARGE), (LARGE, PLAN)])
def test_it_does_not_matter_whether_plan_or_window_changes_first(
    host: Host, connection: Connection, before: int, after: int, window_first: bool
) -> None:
    user = host.subscriber(before)
    give(connection, user, 500)
    host.log(user, before + 200, at=START + DAY)
    now = START + 30 * DAY
    moment = timedelta(seconds=2 if window_first else -2)
    changes: list[Callable[[], None]] = [
        lambda: subscribe_to(host, after, at=now + moment),
        lambda: renew(host, now, at=now),
    ]
    for change in reversed(changes) if window_first else changes:
        change()
        look(connection, user, now)
    assert_adds(host, connection, user, 300, now)
    host.log(user, after + 100, at=now + HOUR)
    renew(host, START + 60 * DAY)
    assert_adds(host, connection, user, 200, START + 60 * DAY)


def test_a_host_that_sets_its_clock_by_the_application_server_may_date_the_window_before_the_plan(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + DAY)
    subscribe_to(host, LARGE, at=START + 30 * DAY)
    renew(host, START + 30 * DAY - timedelta(seconds=3))
    assert_adds(host, connection, user, 300, START + 30 * DAY)


def test_usage_that_a_larger_plan_paid_for_stays_paid_under_a_smaller_plan(host: Host, connection: Connection) -> None:
    user = host.subscriber(LARGE)
    give(connection, user, 500)
    host.log(user, 4_000, at=START + DAY)
    subscribe_to(host, PLAN, at=START + 2 * DAY)
    host.log(user, 30, at=START + 3 * DAY)
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 470, START + 30 * DAY)


def test_a_larger_plan_pays_for_its_whole_window_once_it_is_used(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + DAY)
    subscribe_to(host, LARGE, at=START + 2 * DAY)
    host.log(user, 1, at=START + 3 * DAY)
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 500, START + 30 * DAY)


def test_a_larger_plan_that_was_never_used_frees_no_granted_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + DAY)
    subscribe_to(host, LARGE, at=START + 2 * DAY)
    subscribe_to(host, PLAN, at=START + 2 * DAY + HOUR)
    host.log(user, 50, at=START + 3 * DAY)
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 250, START + 30 * DAY)


def test_a_grant_with_an_expiry_pays_for_no_overdraft_that_a_larger_plan_covers(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 100)
    host.log(user, 1_150, at=START + DAY)
    subscribe_to(host, LARGE, at=START + 2 * DAY)
    number = give(connection, user, 500, at=START + 2 * DAY, expires_at=START + 20 * DAY)
    host.log(user, 40, at=START + 3 * DAY)
    (used,) = (g.tokens_used for g in list_grants(connection, user, now=START + 4 * DAY) if g.id == number)
    assert used == 40


def test_a_plan_whose_size_grows_counts_from_the_next_read_on(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + DAY)
    host.execute("UPDATE billing_tokenplan SET tokens_included = :tokens", tokens=LARGE)
    look(connection, user, START + 2 * DAY)
    host.log(user, 10, at=START + 3 * DAY)
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 500, START + 30 * DAY)


def test_the_first_move_after_a_grant_by_hand_records_the_previous_window_too(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(PLAN)
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_at) VALUES (:user, 500, 'r', :at)",
        user=user,
        at=START,
    )
    host.log(user, 1_200, at=START + DAY)
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 300, START + 30 * DAY)


def test_a_deleted_and_recreated_subscription_is_a_new_window(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 900, at=START + DAY)
    for days in (30, 60):
        row = host.execute("DELETE FROM billing_subscription RETURNING id, token_plan_id").one()
        host.execute(
            "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date) VALUES (:id, :user, :plan, :at)",
            id=row.id + 1_000,
            user=user,
            plan=row.token_plan_id,
            at=START + days * DAY,
        )
        host.log(user, 900, at=START + days * DAY + HOUR)
    renew(host, START + 90 * DAY)
    assert_adds(host, connection, user, 500, START + 90 * DAY)


def test_no_window_is_recorded_for_users_without_grants_or_for_counters(host: Host, connection: Connection) -> None:
    without = host.subscriber(PLAN)
    renew(host, START + DAY)
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    before = host.value("SELECT max(id) FROM trueup.window_change")
    host.decrement(user, 5)
    host.decrement(without, 5)
    assert host.execute("SELECT user_id, id FROM trueup.window_change").all() == [(user, before)]


def test_windows_that_the_host_moved_back_and_repeated_records_are_deleted(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    for days in (30, 60, 0, 30, 31, 30):
        renew(host, START + days * DAY)
    look(connection, user, START + 60 * DAY)
    windows = host.execute("SELECT window_start, settled_until FROM trueup.window_change ORDER BY id").all()
    assert windows == [(START, START + 30 * DAY), (START + 30 * DAY, None)]


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE billing_subscription ALTER start_date TYPE timestamptz(3), ALTER id TYPE int",
        (
            "ALTER TABLE billing_subscription RENAME start_date TO begins; "
            "UPDATE billing_subscription SET begins = now(); INSERT INTO billing_subscription (id, user_id, begins) "
            "SELECT 999, max(id), now() FROM accounts_user"
        ),
        "DROP TABLE trueup.window_change; UPDATE billing_subscription SET start_date = now()",
    ],
)
def test_no_change_by_the_host_fails_because_of_the_trigger(host: Host, connection: Connection, change: str) -> None:
    give(connection, host.subscriber(PLAN), 500)
    host.user()
    host.execute(change)


def test_subscriptions_that_are_no_longer_mapped_record_nothing(host: Host, connection: Connection) -> None:
    give(connection, host.subscriber(PLAN), 500)
    host.execute("CREATE TABLE subs (LIKE billing_subscription INCLUDING ALL)")
    with host.engine.begin() as setting_up:
        install(setting_up, HostMapping(subscription=SubscriptionTable(table="subs")), with_host_tables=False)
    assert host.execute(
        "SELECT CAST(CAST(tgrelid AS regclass) AS text) FROM pg_trigger WHERE tgname = 'trueup_window_changed'"
    ).scalars().all() == ["subs"]


def test_without_the_trigger_the_next_settlement_finds_a_move(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + DAY)
    host.execute("ALTER TABLE billing_subscription DISABLE TRIGGER trueup_window_changed")
    host.execute(SAVE_BASELINE)  # else the gate would refuse
    renew(host, START + 30 * DAY)
    assert_adds(host, connection, user, 300, START + 30 * DAY)


def test_the_tokens_of_a_window_are_never_compared_with_the_usage_of_another(
    host: Host, connection: Connection
) -> None:
    """The host moves the window back during a gate, in the statement that settles the grants."""
    user = host.subscriber(SMALL, start=START + 30 * DAY)
    host.log(user, 2_000, at=START + DAY)
    give(connection, user, 10, at=START + 31 * DAY)
    source = host.value("SELECT pg_get_functiondef(CAST('trueup.settle_grants' AS regproc))")
    change = f"BEGIN UPDATE public.billing_subscription SET start_date = '{START}', token_plan_id = {host.plan(LARGE)};"
    host.connection.exec_driver_sql(source.replace("BEGIN", change, 1))
    hold = hold_tokens(connection, user, 3_000, now=START + 31 * DAY)
    assert host.execute("SELECT window_start, consumed FROM trueup.balance").one() == (START, 2_000)
    assert hold.tokens_left == 3_000


def test_concurrent_grants_revocations_charges_and_renewals_neither_lose_nor_create_tokens(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(PLAN)
    kept, taken = give(connection, user, 500), give(connection, user, 700)
    holds = [hold_tokens(connection, user, 50) for _ in range(8)]

    def renewing() -> None:
        with Host(host.engine) as other:
            for days in (1, 0, 2, 1):
                renew(other, START + days * DAY)

    def granting() -> None:
        with connect() as own:
            grant_tokens(own, user, 50, reason="r", reference="late", by="ann")

    def revoking() -> None:
        with connect() as own:
            revoke_grant(own, user, taken, reason="r", by="ann")

    def charging() -> None:
        with connect() as own:
            for hold in holds:
                charge_tokens(own, hold, 50)

    def reconciling() -> None:
        reconcile(get_engine(), HostMapping())

    run_at_once([renewing, granting, revoking, charging, reconciling])
    account = read_account(connection, user)
    # 400 tokens were used, all within the plan.
    assert (account.original, account.consumed) == (PLAN + 550, 400)
    left = {grant.id: grant.tokens_left for grant in list_grants(connection, user)}
    assert (left[kept], left[taken], sum(left.values())) == (500, 0, 550)
    assert_true(host)


def test_a_grant_given_while_the_host_moves_the_window_knows_the_window_it_began_in(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(PLAN)
    host.log(user, 900, at=START + DAY)
    with host.engine.connect() as moving:
        moving.execute(text("UPDATE billing_subscription SET start_date = :at"), {"at": START + 2 * DAY})
        give(connection, user, 500, at=START + 3 * DAY)  # does not wait for a lock
        moving.commit()
    host.log(user, 900, at=START + 4 * DAY)
    renew(host, START + 5 * DAY)
    assert_adds(host, connection, user, 500, START + 5 * DAY)


def test_a_charge_that_waits_for_a_revocation_uses_the_remaining_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber(0)
    number = give(connection, user, 500)
    hold = hold_tokens(connection, user, 500)

    def charge() -> Any:
        with connect() as own:
            return charge_tokens(own, hold, 200)

    with host.engine.connect() as other, in_background() as submit:
        revoke_grant(other, user, number, reason="r", by="ann")
        charged = submit(charge)
        wait_for_lock(host)
        other.commit()
        assert charged.result().recorded
    # The revocation removed all 500 tokens, so no grant pays for later usage.
    account = read_account(connection, user)
    assert (account.original, account.consumed, account.remaining) == (0, 200, 0)
    assert_true(host)
