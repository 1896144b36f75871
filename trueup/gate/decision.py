"""Checks without a hold. The SQL function `trueup.decide` makes the decision; this module adds the message."""

from datetime import datetime

from sqlalchemy import Connection

from trueup.accounts.account import Account, read_decision
from trueup.accounts.host_connection import HostConnection
from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_estimate
from trueup.gate.denial import Access, describe_denial
from trueup.gate.modes import overrides_denial


def check_access(
    connection: Connection | HostConnection,
    user_id: UserId,
    estimated_tokens: int,
    feature_name: str,
    *,
    now: datetime | None = None,
) -> Access:
    """Return whether a task of that size may run now, with the reason if not. Reserves nothing: only a hold does.

    `estimated_tokens`: a count. `now`: None means the database's clock.
    """
    account, reason = read_decision(connection, user_id, check_estimate(estimated_tokens), now=now)
    access = _access(account)
    if reason is not None:
        access["has_access"] = False
        access["reason"] = reason
        access["message"] = describe_denial(
            reason,
            feature_name=feature_name,
            estimated_tokens=estimated_tokens,
            available=account.available,
        )
    return access


def check_gate(connection: Connection, user_id: UserId, estimated_tokens: int, feature_name: str) -> Access:
    """Return the check of a view's gate: a denied user has access if the feature's mode overrides the denial."""
    access = check_access(connection, user_id, estimated_tokens, feature_name)
    if not access["has_access"]:
        access["has_access"] = overrides_denial(
            connection, user_id, feature_name=feature_name, reason=access["reason"], tokens=estimated_tokens
        )
    return access


def denied_unknown_user() -> Access:
    """Return the answer for a user without an id, such as an anonymous one."""
    return Access(
        has_access=False,
        reason="no_subscription",
        message=describe_denial("no_subscription", feature_name="", estimated_tokens=0, available=0),
        tokens_remaining=0,
        original_tokens=0,
        consumed_tokens=0,
        days_remaining=None,
        tokens_held=0,
        tokens_available=0,
    )


def _access(account: Account) -> Access:
    return Access(
        has_access=True,
        message="Access granted",
        tokens_remaining=account.remaining,
        original_tokens=account.original,
        consumed_tokens=account.consumed,
        days_remaining=account.days_remaining,
        tokens_held=account.held,
        tokens_available=account.available,
    )
