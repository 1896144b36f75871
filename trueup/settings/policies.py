"""The rules of reconciling: which causes are corrected, held for a person, or only reported; and how much, how soon."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trueup.errors import InvalidInputError

Policy = Literal["correct", "review", "report"]
# From the boldest to the most careful: a combination gets the most careful of its causes'.
POLICIES: tuple[Policy, ...] = ("correct", "review", "report")

DEFAULT_POLICIES: dict[str, Policy] = {
    "missed_decrement": "correct",
    "lost_update": "correct",
    "double_decrement": "correct",
    # The host's own rows say that these tokens were used: the log may be what is wrong, and giving them back a gift.
    "charged_not_logged": "review",
    "failed_usage_charged": "correct",
    "clamped_at_zero": "correct",
    "grant_not_in_counter": "correct",
    "counter_null": "correct",
    "counter_negative": "correct",
    "counter_out_of_range": "report",
    "credit_without_grant": "review",
    "renewal_without_new_window": "review",
    "carried_over_tokens": "review",
    "manual_edit": "review",
    "burned_at_expiry": "report",
    # Too high by what may contain a plan's size, it is held for review all the same.
    "unexplained": "correct",
}

# What somebody may have paid for, or done on purpose: only a person may take it away.
PAID_CAUSES = frozenset({"credit_without_grant", "renewal_without_new_window", "carried_over_tokens", "manual_edit"})
# What ended on purpose is not given back by a machine, and what the column can't hold can't be written.
UNCORRECTABLE_CAUSES = frozenset({"burned_at_expiry", "counter_out_of_range"})

DEFAULT_MIN_AGE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a run may do by itself.

    `policies`: those that differ from the default, by cause. `max_correction`: a counter that is off by more tokens is
    held for review; None: no limit. `tolerance`: one that is off by at most so many tokens is left alone.
    `min_age_seconds`: usage younger than this may still be subtracted by the host.
    Raises `InvalidInputError` for a policy that may not be, and for figures below 0.
    """

    policies: Mapping[str, Policy] = field(default_factory=dict)
    max_correction: int | None = None
    tolerance: int = 0
    min_age_seconds: int = DEFAULT_MIN_AGE_SECONDS

    def __post_init__(self) -> None:
        check_policies(self.policies)
        for name in ("max_correction", "tolerance", "min_age_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidInputError(f"{name}: {value} is below 0")

    def policy_of(self, cause: str) -> Policy:
        """Return the policy for a cause; for one that nobody knows, the most careful that a person can still change."""
        return self.policies.get(cause) or DEFAULT_POLICIES.get(cause, "review")


def check_policies(policies: Mapping[str, str]) -> None:
    """Raise `InvalidInputError` unless these may be the policies of these causes."""
    for cause, policy in policies.items():
        if cause not in DEFAULT_POLICIES:
            near = difflib.get_close_matches(cause, DEFAULT_POLICIES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"causes are {', '.join(DEFAULT_POLICIES)}"
            raise InvalidInputError(f"policies.{cause}: no such cause; {hint}")
        if policy not in POLICIES:
            raise InvalidInputError(f"policies.{cause}: {policy!r} is no policy; give {', '.join(POLICIES)}")
        if policy == "correct" and cause in PAID_CAUSES:
            raise InvalidInputError(
                f'policies.{cause}: may not be "correct": these may be paid tokens, which only a person takes away. '
                "Give review or report, and correct single counters with `trueup drift accept`"
            )
        if policy == "correct" and cause in UNCORRECTABLE_CAUSES:
            raise InvalidInputError(f'policies.{cause}: may not be "correct". Give review or report')
