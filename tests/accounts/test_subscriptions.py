"""Subscriptions that can't be metered: a subscription that has not begun, and two subscriptions of one user."""

import logging
import pickle
from datetime import timedelta

import pytest
from sqlalchemy import Connection, text

from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.subscriptions import SeveralSubscriptionsError
from trueup.accounts.summary import read_summary
from trueup.billing.utils import check_ai_access_for_user
from trueup.database.engine import get_engine
from trueup.errors import NotInstalledError, TokensDenied
from trueup.gate.decision import check_access
from trueup.gate.provider_calls import extend_hold
from trueup.host.fields import SubscriptionTable
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile

pytestmark = pytest.mark.dated

MINUTE = timedelta(minutes=1)
TOLERANCE = 5 * MINUTE


def set_up(host: Host, mapping: HostMapping | None = None) -> None:
    with host.engine.begin() as connection:
        install(connection, mapping or HostMapping(), with_host_tables=False)


def test_a_subscription_that_has_not_begun_is_not_active(host: Host, connection: Connection) -> None:
    """No usage would count in it, so nothing would limit it."""
    user = host.subscriber(1_000, start=START + TOLERANCE + timedelta(microseconds=1))
    access = check_access(connection, user, 0, "Test", now=START)
    assert (access["has_access"], access.get("reason")) == (False, "subscription_deactivated")
    # The specification's figures do not change.
    assert (access["original_tokens"], access["consumed_tokens"], access["tokens_remaining"]) == (1_000, 0, 1_000)
    with pytest.raises(TokensDenied) as denied:
        hold_tokens(connection, user, 1, now=START)
    assert denied.value.error_code == "subscription_deactivated"
    host.execute("UPDATE billing_subscription SET start_date = clock_timestamp() + interval '1 hour'")
    assert check_ai_access_for_user(user, 1, "Test").get("reason") == "subscription_deactivated"


def test_a_hold_of_the_window_before_is_not_extended_into_one_that_has_not_begun(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 100, now=START)
    host.execute("UPDATE billing_subscription SET start_date = :at", at=START + timedelta(days=1))
    assert extend_hold(connection, hold, 1, now=START) == ("subscription_deactivated", 100)
    # Usage of an admitted task is recorded at its time, which is not in the new window.
    charge_tokens(connection, hold, 100, now=START)
    assert host.value("SELECT created_at FROM ai_usage_log") == START
    assert balance(host, user) == (0, 0)


def test_a_hosts_clock_may_be_a_little_ahead_and_its_tokens_are_still_limited(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000, start=START + TOLERANCE)
    for number in (1, 2):
        hold = hold_tokens(connection, user, 500, now=START)
        charge_tokens(connection, hold, 500, now=START)
        assert read_account(connection, user, now=START).consumed == 500 * number
    with pytest.raises(TokensDenied) as denied:
        hold_tokens(connection, user, 1, now=START)
    assert denied.value.error_code == "no_tokens_remaining"
    dates = set(host.execute("SELECT created_at FROM ai_usage_log").scalars())
    assert dates == {START + TOLERANCE}
    assert set(host.execute("SELECT charged_at FROM trueup.charge").scalars()) == {START}
    assert_true(host)


@pytest.fixture
def double(host: Host) -> int:
    """Return a user whose second subscription was added after the setup."""
    set_up(host)
    user = host.subscriber(1_000)
    host.execute(
        "ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_key; "
        "CREATE INDEX ON billing_subscription (user_id)"
    )
    return user


def subscribe_again(host: Host, user: int) -> None:
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
        "SELECT 1000 + id, user_id, token_plan_id, start_date + interval '1 day', 1000 "
        "FROM billing_subscription WHERE user_id = :user",
        user=user,
    )


@pytest.mark.parametrize("granted", [False, True])
def test_a_second_subscription_stops_the_user_and_says_why(
    host: Host, connection: Connection, double: int, granted: bool
) -> None:
    other = host.subscriber(1_000)
    hold = hold_tokens(connection, double, 300)
    if granted:
        connection.execute(
            text("SELECT trueup.grant_tokens(:user, 50, 'r', 'tx', NULL, 'ann', NULL)"), {"user": double}
        )
    subscribe_again(host, double)
    for ask in (
        lambda: hold_tokens(connection, double, 1),
        lambda: check_ai_access_for_user(double, 1, "Test"),
        lambda: read_account(connection, double),
        lambda: read_summary(connection, HostMapping(), double),
    ):
        with pytest.raises(SeveralSubscriptionsError, match=r"billing_subscription\.user_id.*unique index") as error:
            ask()
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # noqa: S301 - our own
    # Paid usage is still recorded, once.
    assert charge_tokens(connection, hold, 200).recorded
    assert not charge_tokens(connection, hold, 200).recorded
    assert host.used(double) == 200
    assert extend_hold(connection, hold, 1)[0] == "subscription_deactivated"
    hold_tokens(connection, other, 1_000)
    # Other users are not affected.
    host.log(other, 10)
    reconcile(get_engine(), HostMapping())
    assert host.counter(other) == 990
    host.execute("DELETE FROM billing_subscription WHERE id > 1000")
    assert read_account(connection, double).consumed == 200
    hold_tokens(connection, double, 100)
    assert_true(host)


def test_two_subscriptions_of_a_user_are_refused_at_the_setup(host: Host, double: int) -> None:
    subscribe_again(host, double)
    with pytest.raises(NotInstalledError, match=rf"billing_subscription\.user_id.*\({double}\).*unique index"):
        set_up(host)
    users = [host.subscriber() for _ in range(6)]
    for user in users:
        subscribe_again(host, user)
    with pytest.raises(NotInstalledError, match=rf"\({double}, {users[0]}, .*, and more\)"):
        set_up(host)


def test_a_column_without_a_unique_index_is_logged_as_a_warning(
    host: Host, double: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        set_up(host)
        host.execute("CREATE UNIQUE INDEX part ON billing_subscription (user_id) WHERE is_active")
        host.execute("CREATE UNIQUE INDEX wide ON billing_subscription (user_id, id)")
        set_up(host)
        assert len(caplog.records) == 2
        assert "no unique index" in caplog.text
        assert "column=billing_subscription.user_id" in caplog.text
        host.execute("CREATE UNIQUE INDEX whole ON billing_subscription (user_id)")
        set_up(host)
    assert len(caplog.records) == 2


def test_a_view_in_place_of_a_table_is_refused_at_the_setup(host: Host) -> None:
    host.execute("CREATE VIEW subs AS SELECT * FROM billing_subscription")
    with pytest.raises(NotInstalledError, match="subs is no table"):
        set_up(host, HostMapping(subscription=SubscriptionTable(table="subs")))
