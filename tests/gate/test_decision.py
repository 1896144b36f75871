from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.host import NOW, Host
from tests.support.work import hold_tokens
from trueup.accounts.validation import MAX_TOKENS, check_estimate
from trueup.errors import InvalidInputError, TokensDenied
from trueup.gate.decision import check_access, denied_unknown_user
from trueup.gate.denial import denial_payload

pytestmark = pytest.mark.dated

DAY = timedelta(days=1)


def reasons(connection: Connection, user: int, tokens: int) -> tuple[str | None, str | None]:
    """Return the reasons of the check and of the gate. A denial of the gate must have the check's figures."""
    access = check_access(connection, user, tokens, "Test", now=NOW)
    denied = None
    try:
        hold_tokens(connection, user, tokens, now=NOW)
    except TokensDenied as error:
        denied = error
    assert denied is None or denied.payload == denial_payload(access)
    return access.get("reason"), denied.error_code if denied else None


@pytest.mark.parametrize(
    ("subscription", "used", "held", "tokens", "reason"),
    [
        ({}, 0, 0, 1_000, None),
        ({}, 0, 0, 1_001, "insufficient_tokens"),
        ({}, 999, 0, 1, None),
        ({}, 999, 0, 2, "insufficient_tokens"),
        ({}, 1_000, 0, 0, "no_tokens_remaining"),
        ({}, 1_001, 0, 0, "no_tokens_remaining"),
        ({}, 0, 1_000, 0, None),
        ({}, 0, 1_000, 1, "insufficient_tokens"),
        ({}, 400, 500, 100, None),
        ({}, 400, 500, 101, "insufficient_tokens"),
        ({}, 0, 0, MAX_TOKENS, "insufficient_tokens"),
        ({"tokens": 0}, 0, 0, 0, "no_tokens_remaining"),
        ({"end": NOW}, 0, 0, 1, None),
        ({"end": NOW - timedelta(microseconds=1)}, 0, 0, 1, "subscription_expired"),
        ({"end": NOW + DAY}, 0, 0, 1, None),
        ({"active": False}, 0, 0, 0, "subscription_deactivated"),
        # The first reason that applies is returned.
        ({"active": False, "end": NOW - DAY}, 1_000, 0, 1, "subscription_deactivated"),
        ({"end": NOW - DAY}, 1_000, 0, 1, "subscription_expired"),
        ({}, 1_000, 0, 5_000, "no_tokens_remaining"),
    ],
)
def test_the_check_and_the_gate_give_the_same_reason(
    host: Host,
    connection: Connection,
    subscription: dict[str, Any],
    used: int,
    held: int,
    tokens: int,
    reason: str | None,
) -> None:
    later = {key: value for key, value in subscription.items() if key in ("active", "end")}
    user = host.subscriber(subscription.get("tokens", 1_000))
    if held:
        hold_tokens(connection, user, held, now=NOW)
    if used:
        host.log(user, used)
    for column, value in {"active": "is_active", "end": "end_date"}.items():
        if column in later:
            host.execute(f"UPDATE billing_subscription SET {value} = :value", value=later[column])
    assert reasons(connection, user, tokens) == (reason, reason)


def test_the_denial_of_a_user_without_a_subscription_says_so(host: Host, connection: Connection) -> None:
    assert reasons(connection, host.user(), 0) == ("no_subscription", "no_subscription")
    assert reasons(connection, 987_654, 0) == ("no_subscription", "no_subscription")


def test_a_null_active_flag_reads_as_deactivated(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    host.execute("ALTER TABLE billing_subscription ALTER is_active DROP NOT NULL")
    host.execute("UPDATE billing_subscription SET is_active = NULL")
    assert reasons(connection, user, 1) == ("subscription_deactivated", "subscription_deactivated")


def test_a_check_reserves_nothing(host: Host, connection: Connection) -> None:
    user = host.subscriber(100)
    for _ in range(3):
        assert check_access(connection, user, 100, "Test")["has_access"]
    assert host.value("SELECT count(*) FROM trueup.hold") == 0


def test_the_answer_has_exactly_the_keys_of_the_specification_and_the_held_figures(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000, end=NOW + timedelta(days=25, hours=3))
    host.log(user, 100)
    hold_tokens(connection, user, 200, now=NOW)
    granted = check_access(connection, user, 700, "Test", now=NOW)
    assert granted == {
        "has_access": True,
        "message": "Access granted",
        "tokens_remaining": 900,
        "original_tokens": 1_000,
        "consumed_tokens": 100,
        "days_remaining": 25,
        "tokens_held": 200,
        "tokens_available": 700,
    }
    denied = check_access(connection, user, 701, "My feature", now=NOW)
    assert denied == granted | {
        "has_access": False,
        "reason": "insufficient_tokens",
        "message": "Insufficient tokens for My feature: 701 needed, 700 available",
    }


def test_the_error_body_is_the_specifications(host: Host, connection: Connection) -> None:
    user = host.subscriber(10_000, end=NOW + timedelta(days=25, hours=1))
    host.log(user, 10_000)
    assert denial_payload(check_access(connection, user, 1, "Test", now=NOW)) == {
        "success": False,
        "error": "No tokens remaining in subscription",
        "error_code": "no_tokens_remaining",
        "tokens_remaining": 0,
        "original_tokens": 10_000,
        "consumed_tokens": 10_000,
        "days_remaining": 25,
    }


def test_a_user_without_an_id_is_denied_like_one_without_a_subscription(host: Host, connection: Connection) -> None:
    assert denied_unknown_user() == check_access(connection, host.user(), 0, "Test")


@pytest.mark.parametrize("estimate", [-1, True, False, 1.0, 1.5, "5", None, 2**63, float("nan"), [1]])
def test_an_estimate_that_is_no_count_is_refused_by_name(estimate: Any) -> None:
    with pytest.raises(ValueError, match=r"^estimated_tokens: ") as refused:
        check_estimate(estimate)
    assert isinstance(refused.value, InvalidInputError)


@pytest.mark.parametrize("estimate", [0, 1, MAX_TOKENS])
def test_a_count_is_returned_as_it_is(estimate: int) -> None:
    assert check_estimate(estimate) == estimate
