"""A denial: its reason code, its message for people, and the specification's error body, which HTTP 402 carries."""

from typing import TYPE_CHECKING, Literal

from trueup.errors import DenialPayload

if TYPE_CHECKING:
    from trueup.gate.decision import Access

Reason = Literal[
    "no_subscription",
    "subscription_deactivated",
    "subscription_expired",
    "no_tokens_remaining",
    "insufficient_tokens",
]


def describe_denial(reason: str, *, feature_name: str, estimated_tokens: int, available: int) -> str:
    """Return the message of a reason code, for people. `estimated_tokens`, `available`: counts."""
    if reason == "insufficient_tokens":
        return f"Insufficient tokens for {feature_name}: {estimated_tokens} needed, {available} available"
    return {
        "no_subscription": "No subscription found",
        "subscription_deactivated": "Subscription is deactivated",
        "subscription_expired": "Subscription has expired",
        "no_tokens_remaining": "No tokens remaining in subscription",
    }[reason]


def denial_payload(access: "Access") -> DenialPayload:
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
