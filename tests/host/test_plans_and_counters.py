"""Hosts that add two plans, count used tokens, or mark subscriptions without a limit."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.mapped import NO_AGE, Remap
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import grant_tokens
from trueup.database.engine import get_engine
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold
from trueup.host.mapping import HostMapping
from trueup.preview.scan import scan
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import Finding
from trueup.reconcile.shards import find_suspects
from trueup.review.decisions import decide_drift, list_reviews, undo_run
from trueup.settings.policies import Rules

ADDED = '[host.subscription]\ntokens_included = "sum"'
UP = """
    token_plan = false
    full_plan = false
    [host.subscription]
    counter = {column = "tokens_used", counts = "up"}
    tokens_included = "token_limit"
"""
USED_COLUMNS = (
    "ALTER TABLE billing_subscription ADD token_limit integer, ADD tokens_used integer CHECK (tokens_used >= 0)",
    "ALTER TABLE billing_subscription DROP tokens_remaining",
)


def found_by_scan(host: Host, mapping: HostMapping) -> list[Finding]:
    found: list[Finding] = []
    scan(host.engine, mapping, lambda checked, findings: found.extend(findings), rules=NO_AGE)
    return found


def with_both_plans(host: Host, token: int, full: int, counter: int) -> int:
    user = host.subscriber(full, kind="full", counter=counter)
    host.execute(
        "UPDATE billing_subscription SET token_plan_id = :plan WHERE user_id = :user",
        plan=host.plan(token),
        user=user,
    )
    return user


def test_a_trial_and_a_pack_that_add_up_are_no_drift(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap(ADDED)
    user = with_both_plans(host, 20_000, 15_000, counter=33_800)
    host.log(user, 1_200)
    assert found_by_scan(host, mapping) == []
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0
    assert find_suspects(connection, mapping, None, None) == []
    assert host.counter(user) == 33_800
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 33_801)
    charge_tokens(connection, hold_tokens(connection, user, 33_800), 800)
    assert host.counter(user) == 33_000
    account = read_account(connection, user)
    assert (account.original, account.consumed, account.drift) == (35_000, 2_000, 0)
    assert_true(host, mapping)


def test_without_the_sum_the_token_plan_counts_alone(host: Host, connection: Connection) -> None:
    user = with_both_plans(host, 20_000, 15_000, counter=20_000)
    assert read_account(connection, user).original == 20_000


@pytest.mark.parametrize(
    ("token", "full", "original"),
    [(None, 300, 300), (200, None, 200), (None, None, 0), (-5, 300, 300), (2**31 - 1, 2**31 - 1, 2**32 - 2)],
)
def test_the_sum_of_plans_counts_a_missing_plan_as_none(
    host: Host,
    connection: Connection,
    remap: Remap,
    token: int | None,
    full: int | None,
    original: int,
) -> None:
    remap(ADDED)
    user = with_both_plans(host, token or 0, full or 0, counter=0)
    for plan, tokens in (("token", token), ("full", full)):
        if tokens is None:
            host.execute(f"UPDATE billing_subscription SET {plan}_plan_id = NULL")
    assert read_account(connection, user).original == original


def test_a_grant_pays_only_for_usage_beyond_both_plans(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap(ADDED)
    user = with_both_plans(host, 200, 100, counter=300)
    grant_tokens(connection, user, 50, reason="r", reference="r", by="ann")
    host.log(user, 320, at=datetime.now(UTC))
    hold_tokens(connection, user, 10)
    assert read_account(connection, user).original == 350
    # A new period begins: the grant keeps the 30 tokens that both plans left it.
    host.execute("UPDATE billing_subscription SET start_date = clock_timestamp()")
    assert read_account(connection, user).original == 330


@pytest.fixture
def counted_up(host: Host, remap: Remap) -> tuple[HostMapping, Callable[..., int]]:
    mapping = remap(UP, *USED_COLUMNS)

    def subscribe(limit: int, used: int | None) -> int:
        user = host.user()
        host.execute(
            "INSERT INTO billing_subscription (user_id, start_date, token_limit, tokens_used) "
            "VALUES (:user, '2024-11-01 12:00Z', :limit, :used)",
            user=user,
            limit=limit,
            used=used,
        )
        return user

    return mapping, subscribe


def used_of(host: Host, user: int) -> int | None:
    used: int | None = host.value("SELECT tokens_used FROM billing_subscription WHERE user_id = :user", user=user)
    return used


def test_a_counter_of_used_tokens_that_equals_the_log_is_no_drift(
    host: Host, connection: Connection, counted_up: tuple[HostMapping, Callable[..., int]]
) -> None:
    mapping, subscribe = counted_up
    right, beyond = subscribe(10_000, 3_000), subscribe(1_000, 1_100)
    host.log(right, 3_000)
    host.log(beyond, 1_100)
    assert found_by_scan(host, mapping) == []
    assert reconcile(get_engine(), mapping, rules=NO_AGE, kind="deep").drifted == 0
    assert find_suspects(connection, mapping, None, None) == []
    assert (used_of(host, right), used_of(host, beyond)) == (3_000, 1_100)
    account = read_account(connection, right)
    assert (account.original, account.remaining, account.counter, account.drift) == (10_000, 7_000, 7_000, 0)
    assert read_account(connection, beyond).drift == 0


def test_a_charge_raises_a_counter_of_used_tokens(
    host: Host, connection: Connection, counted_up: tuple[HostMapping, Callable[..., int]]
) -> None:
    mapping, subscribe = counted_up
    user = subscribe(1_000, 0)
    hold = hold_tokens(connection, user, 1_000)
    charge_tokens(connection, hold, 400)
    assert used_of(host, user) == 400
    charge_tokens(connection, hold, 700, key="2")
    assert used_of(host, user) == 1_100
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0
    assert_true(host, mapping)


def test_a_missed_raise_is_corrected_and_can_be_undone(
    host: Host, connection: Connection, counted_up: tuple[HostMapping, Callable[..., int]]
) -> None:
    mapping, subscribe = counted_up
    missed, beyond, empty = subscribe(10_000, 2_000), subscribe(1_000, 900), subscribe(1_000, None)
    for user, tokens in ((missed, 2_000), (missed, 750), (beyond, 900), (beyond, 300), (empty, 70)):
        host.log(user, tokens)
    assert {one.drift.user_id: one.drift.tokens for one in found_by_scan(host, mapping)} == {
        missed: 750,
        beyond: 300,
        empty: -930,
    }
    run = reconcile(get_engine(), mapping, rules=NO_AGE)
    assert (run.drifted, run.corrected) == (3, 3)
    assert [used_of(host, user) for user in (missed, beyond, empty)] == [2_750, 1_200, 70]
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0
    assert run.run_id is not None
    undo_run(connection, run.run_id, mapping.user_id_type, by="ann", note="n")
    assert [used_of(host, user) for user in (missed, beyond, empty)] == [2_000, 900, None]


def test_a_correction_never_overwrites_a_raise_of_the_host(
    host: Host, connection: Connection, counted_up: tuple[HostMapping, Callable[..., int]]
) -> None:
    _, subscribe = counted_up
    user = subscribe(1_000, 100)
    correct = (
        "SELECT count(*) FROM trueup.correct_counters(ARRAY[CAST(:user AS bigint)], "
        "ARRAY(SELECT id::text FROM billing_subscription), ARRAY[CAST(:seen AS bigint)], ARRAY[CAST(800 AS bigint)])"
    )
    assert host.value(correct, user=user, seen=950) == 0
    assert host.value(correct, user=user, seen=900) == 1
    assert used_of(host, user) == 200


def test_a_decision_about_a_counter_of_used_tokens_is_carried_out(
    host: Host, connection: Connection, counted_up: tuple[HostMapping, Callable[..., int]]
) -> None:
    mapping, subscribe = counted_up
    rules = Rules(min_age_seconds=0, max_correction=1)
    accepted, granted = subscribe(10_000, 0), subscribe(10_000, 0)
    host.log(accepted, 700)
    host.log(granted, 900)
    reconcile(get_engine(), mapping, rules=rules)
    drifts = {item.user_id: item.id for item in list_reviews(connection, mapping.user_id_type)}
    decide_drift(connection, drifts[accepted], "accept", by="ann", note="n")
    decide_drift(connection, drifts[granted], "grant", by="ann", note="n", reference="r")
    assert (used_of(host, accepted), used_of(host, granted)) == (700, 900)
    assert read_account(connection, accepted).remaining == 9_300
    assert read_account(connection, granted).remaining == 10_000
    assert reconcile(get_engine(), mapping, rules=NO_AGE).drifted == 0


def test_an_unlimited_plan_passes_the_gate_and_its_counter_is_never_written(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap("[host.subscription]\nunlimited = -1")
    users = [host.subscriber(-1, counter=-1), host.subscriber(-1, kind="full", counter=5_000)]
    limited = host.subscriber(1_000, counter=1_000)
    for user in users:
        host.log(user, 3_000)
        hold = hold_tokens(connection, user, 1_000_000)
        charge_tokens(connection, hold, 900)
        assert close_hold(connection, hold) == "settled"
        account = read_account(connection, user)
        assert (account.unlimited, account.consumed, account.drift) == (True, 3_900, None)
    assert found_by_scan(host, mapping) == []
    assert reconcile(get_engine(), mapping, rules=NO_AGE, kind="deep").drifted == 0
    assert find_suspects(connection, mapping, None, None) == []
    assert [host.counter(user) for user in (*users, limited)] == [-1, 5_000, 1_000]
    with pytest.raises(TokensDenied):
        hold_tokens(connection, limited, 1_001)
    assert_true(host, mapping)


@pytest.mark.parametrize(("unlimited", "tokens"), [('"null"', None), ("0", 0), ("-1", -1)])
@pytest.mark.parametrize("rule", ["first", "sum"])
def test_each_value_may_mean_unlimited_and_no_plan_never_does(
    host: Host,
    connection: Connection,
    remap: Remap,
    unlimited: str,
    tokens: int | None,
    rule: str,
) -> None:
    nullable = "ALTER TABLE billing_tokenplan ALTER tokens_included DROP NOT NULL"
    remap(f"[host.subscription]\nunlimited = {unlimited}\ntokens_included = '{rule}'", nullable)
    user, without = host.subscriber(7), host.subscriber(5)
    host.execute("UPDATE billing_tokenplan SET tokens_included = :tokens WHERE tokens_included = 7", tokens=tokens)
    host.execute("UPDATE billing_subscription SET token_plan_id = NULL WHERE user_id = :user", user=without)
    # The lack of a plan is no figure, whatever figure means unlimited.
    assert (read_account(connection, user).unlimited, read_account(connection, without).unlimited) == (True, False)
    assert read_account(connection, without).original == 0


def test_a_counter_means_unlimited_only_if_the_mapping_says_so(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap("[host.subscription]\nunlimited = {included = -1, counter = -1}")
    by_counter, limited = host.subscriber(100, counter=-1), host.subscriber(100, counter=-2)
    assert hold_tokens(connection, by_counter, 10_000).tokens_left == 10_000
    assert not read_account(connection, limited).unlimited


def test_an_unlimited_subscription_uses_up_no_grant_without_an_expiry(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    remap("[host.subscription]\nunlimited = -1")
    user = host.subscriber(-1, counter=-1)
    grant_tokens(connection, user, 500, reason="r", reference="r", by="ann")
    host.log(user, 400, at=datetime.now(UTC))
    account = read_account(connection, user)
    assert (account.unlimited, account.consumed) == (True, 400)
    host.execute("UPDATE billing_tokenplan SET tokens_included = 1000")
    host.execute("UPDATE billing_subscription SET start_date = clock_timestamp()")
    assert read_account(connection, user).original == 1_500


@pytest.mark.parametrize(
    ("plan", "counter", "cause"),
    [(-1, -1, "plan_negative"), (-1, 500, "plan_negative"), (1_000, -1, "counter_negative")],
)
def test_a_negative_plan_or_counter_waits_for_a_person_unless_the_mapping_explains_it(
    host: Host, connection: Connection, plan: int, counter: int, cause: str
) -> None:
    user = host.subscriber(plan, counter=counter)
    run = reconcile(get_engine(), HostMapping(), rules=NO_AGE)
    assert (run.drifted, run.corrected) == (1, 0)
    assert [item.cause for item in list_reviews(connection, "bigint")] == [cause]
    assert host.counter(user) == counter


@pytest.mark.parametrize(
    "settings",
    [
        (
            "tokens_included = 'sum'\ncounter = {column = 'tokens_remaining', counts = 'up'}\n"
            "unlimited = {included = -1, counter = -1}\nperiod = {every = 'month', anchor = 'first'}"
        ),
        (
            "tokens_included = 'quota'\ncounter = {column = 'tokens_remaining', counts = 'up'}\nunlimited = 'null'\n"
            "period = {every = 'month', time_zone = 'Asia/Tehran'}"
        ),
        (
            "tokens_included = {expression = '{row}.quota + 1'}\nunlimited = -1\ncounter_kept_by = 'host'\n"
            "period = {every = 'month', anchor = 'first', time_zone = 'Asia/Tehran'}"
        ),
        "tokens_included = 'sum'\nunlimited = 0\nperiod = {every = 'month'}\n[host.usage_log]\nrecord = 'host'",
    ],
)
def test_all_settings_of_a_subscription_work_together(
    host: Host,
    connection: Connection,
    remap: Remap,
    settings: str,
) -> None:
    mapping = remap(
        f"[host.subscription]\n{settings}",
        "ALTER TABLE billing_subscription ADD quota bigint DEFAULT 500",
    )
    user = with_both_plans(host, 300, 200, counter=0)
    grant_tokens(connection, user, 50, reason="r", reference="r", by="ann")
    hold = hold_tokens(connection, user, 400)
    charge_tokens(connection, hold, 100)
    assert close_hold(connection, hold) == "settled"
    host.execute("UPDATE billing_subscription SET quota = 600, full_plan_id = NULL")
    host.execute("UPDATE billing_subscription SET start_date = start_date + interval '1 day'")
    assert read_account(connection, user).consumed == 100
    found_by_scan(host, mapping)
    reconcile(get_engine(), mapping, rules=NO_AGE, kind="deep")
    for item in list_reviews(connection, mapping.user_id_type):
        decide_drift(connection, item.id, "ignore", by="ann", note="n")
    assert reconcile(get_engine(), mapping, rules=NO_AGE).defects == 0
    assert_true(host, mapping)
