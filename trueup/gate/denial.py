"""The answer to a check. A denial has a reason code, a message, and the specification's error body (HTTP 402)."""

from typing import Literal, NotRequired, TypedDict

from trueup.errors import DenialPayload

Reason = Literal[
    "no_subscription",
    "subscription_deactivated",
    "subscription_expired",
    "no_tokens_remaining",
    "insufficient_tokens",
    "usage_uncountable",
]


class Access(TypedDict):
    """The answer to a check. Tokens are counts; `days_remaining` None means unlimited.

    As in the specification, `reason` is present only if the check denies. The feature's mode may
    give access all the same.
    """

    has_access: bool
    message: str
    tokens_remaining: int
    original_tokens: int
    consumed_tokens: int
    days_remaining: int | None
    tokens_held: int
    tokens_available: int
    reason: NotRequired[str]


def describe_denial(reason: str, *, feature_name: str, estimated_tokens: int, available: int) -> str:
    """Return the message for a reason code. `estimated_tokens`, `available`: counts."""
    if reason == "insufficient_tokens":
        return f"Insufficient tokens for {feature_name}: {estimated_tokens} needed, {available} available"
    return {
        "no_subscription": "No subscription found",
        "subscription_deactivated": "Subscription is deactivated",
        "subscription_expired": "Subscription has expired",
        "no_tokens_remaining": "No tokens remaining in subscription",
        "usage_uncountable": "The usage log's rows of this user add up to more than can be counted",
    }[reason]


def denial_payload(access: Access) -> DenialPayload:
    """Return the specification's error body for a denied access."""
    return DenialPayload(
        success=False,
        error=access["message"],
        error_code=access["reason"],
        tokens_remaining=access["tokens_remaining"],
        original_tokens=access["original_tokens"],
        consumed_tokens=access["consumed_tokens"],
        days_remaining=access["days_remaining"],
    )
