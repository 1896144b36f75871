"""Paid tokens are never removed silently: not by late payments, renewals, decisions or their undo."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Connection

from tests.accounts.test_grants import DAY, PLAN, pay, paying
from tests.support.host import Host
from trueup.accounts.payments import import_payments
from trueup.database.engine import connect, get_engine
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.review.decisions import DecisionRefusedError, decide_drift, list_reviews, undo_run

pytestmark = pytest.mark.dated

__all__ = ["paying"]  # a fixture
PACK = 500


def reconciled(mapping: HostMapping | None = None) -> int:
    run_id = reconcile(get_engine(), mapping or HostMapping()).run_id
    assert run_id is not None
    return run_id


def raise_counter(host: Host, tokens: int) -> None:
    host.execute("UPDATE billing_subscription SET tokens_remaining = tokens_remaining + :tokens", tokens=tokens)


@pytest.mark.parametrize("used", [0, PACK])
def test_a_payment_that_completes_long_after_it_was_begun_is_held_for_review(
    paying: tuple[Host, HostMapping], used: int
) -> None:
    """A run in between found the counter correct, so the payment's time is before all later changes."""
    host, mapping = paying
    now = datetime.now(UTC)
    user, pack = host.subscriber(PLAN, start=now - 2 * DAY), host.plan(PACK)
    pay(host, user, pack, "tx-1", at=now - timedelta(hours=1), status="pending")
    reconciled(mapping)
    if used:
        host.log(user, used, at=now - timedelta(minutes=3))
        host.decrement(user, used)
    host.execute("UPDATE billing_payment SET status = 'completed'")
    raise_counter(host, PACK)
    reconciled(mapping)
    assert host.counter(user) == PLAN - used + PACK


def renewed(host: Host, connection: Connection) -> None:
    host.execute("UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = 10000")


def accepted(host: Host, connection: Connection) -> None:
    raise_counter(host, PACK)
    reconciled()
    (item,) = list_reviews(connection, "bigint")
    decide_drift(connection, item.id, "accept", by="ann", note="no pack")


@pytest.mark.parametrize("since", [renewed, accepted])
def test_an_undo_keeps_a_counter_that_was_set_to_the_same_value_since(
    host: Host, connection: Connection, since: Callable[[Host, Connection], None]
) -> None:
    host.plan(PACK)
    user = host.subscriber(10_000, counter=2_000)
    run_id = reconciled()
    since(host, connection)
    assert host.counter(user) == 10_000
    undone = undo_run(connection, run_id, "bigint", by="ann", note="wrong")
    assert (undone.counters, undone.left, host.counter(user)) == (0, 1, 10_000)


def test_a_purchase_in_review_is_not_wiped_out_by_a_later_drop(host: Host, connection: Connection) -> None:
    host.plan(PACK)
    user = host.subscriber(10_000)
    host.log(user, 600)
    host.decrement(user, 600)
    raise_counter(host, PACK)
    reconciled()
    host.decrement(user, 733)
    for _ in range(2):
        reconciled()
        assert len(list_reviews(connection, "bigint")) == 1
        assert host.counter(user) == 10_000 - 600 + PACK - 733


def test_a_drift_that_a_person_ignored_stays_ignored_in_a_window_with_a_later_date(
    host: Host, connection: Connection
) -> None:
    host.plan(PACK)
    host.subscriber(10_000, start=datetime.now(UTC) + DAY)
    raise_counter(host, PACK)
    reconciled()
    (item,) = list_reviews(connection, "bigint")
    decide_drift(connection, item.id, "ignore", by="ann", note="ours")
    reconciled()
    assert list_reviews(connection, "bigint") == []
    # The decision does not apply to another window.
    host.execute("UPDATE billing_subscription SET start_date = start_date + interval '1 hour'")
    reconciled()
    assert len(list_reviews(connection, "bigint")) == 1


def test_two_packs_under_one_reference_are_not_granted_as_one(paying: tuple[Host, HostMapping]) -> None:
    host, mapping = paying
    now = datetime.now(UTC)
    user, pack = host.subscriber(PLAN, start=now - 2 * DAY), host.plan(PACK)
    for seconds in (0, 1):
        pay(host, user, pack, "tx-1", at=now - DAY + timedelta(seconds=seconds))
    for outcomes in (["granted", "same_reference"], ["already", "same_reference"]):
        with connect() as connection:
            given = import_payments(connection, mapping, by="ann")
        assert sorted(payment.outcome for payment in given) == outcomes


def test_a_plan_that_changes_while_a_person_decides_stops_the_decision(host: Host, connection: Connection) -> None:
    """The plan changes between the read of the account and the lock of the counter, in the statement that locks it."""
    host.plan(PACK)
    user, larger = host.subscriber(10_000), host.plan(10_500)
    reconciled()
    raise_counter(host, PACK)
    reconciled()
    (item,) = list_reviews(connection, "bigint")
    source = host.value("SELECT pg_get_functiondef(CAST('trueup.lock_counter' AS regproc))")
    change = f"BEGIN UPDATE public.billing_subscription SET token_plan_id = {larger};"
    host.connection.exec_driver_sql(source.replace("BEGIN", change, 1))
    with pytest.raises(DecisionRefusedError):
        decide_drift(connection, item.id, "accept", by="ann", note="no pack")
    assert host.counter(user) == 10_500
