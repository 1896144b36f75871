"""The policies of drift causes and the limits of a run; the settings [reconcile] in trueup.toml."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trueup.errors import InvalidInputError

Policy = Literal["correct", "review", "report"]
# From the boldest to the most careful. A combination of causes gets the most careful policy of all.
POLICIES: tuple[Policy, ...] = ("correct", "review", "report")

DEFAULT_POLICIES: dict[str, Policy] = {
    "missed_decrement": "correct",
    "lost_update": "correct",
    # The journal shows the changes that were overwritten.
    "stale_write": "correct",
    "double_decrement": "correct",
    # The host's rows say that these tokens were used. If the log is incomplete, a correction would give them away.
    "charged_not_logged": "review",
    "host_decremented_our_charge": "correct",
    "failed_usage_charged": "correct",
    "clamped_at_zero": "correct",
    "grant_not_in_counter": "correct",
    "period_reset": "correct",
    "counter_null": "correct",
    # A figure below zero may mean unlimited (`subscription.unlimited`).
    "counter_negative": "review",
    "plan_negative": "review",
    "counter_out_of_range": "report",
    "credit_without_grant": "review",
    "credited_twice": "review",
    "renewal_without_new_window": "review",
    "carried_over_tokens": "review",
    "manual_edit": "review",
    "burned_at_expiry": "report",
    # A counter that is too high by a possible plan size is held for review in any case.
    "unexplained": "correct",
}

# These tokens may be paid for, or set on purpose. Only a person may take them away.
PAID_CAUSES = frozenset(
    {"credit_without_grant", "credited_twice", "renewal_without_new_window", "carried_over_tokens", "manual_edit"}
)
# A machine does not give back tokens that ended on purpose, can't write a value that the column can't hold, and does
# not know what a plan below zero includes.
UNCORRECTABLE_CAUSES = frozenset({"burned_at_expiry", "counter_out_of_range", "plan_negative"})

DEFAULT_MIN_AGE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a run may do without a person.

    `policies`: by cause, where they differ from the default. `max_correction`: a drift of more tokens is held for
    review; None: no limit. `tolerance`: a drift of at most this many tokens is ignored. `min_age_seconds`: the host may
    still subtract younger usage. Raises `InvalidInputError` for a policy that is not allowed and for values below 0.
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
                raise InvalidInputError(f"{name}: {value} is below 0. Give 0 or more")

    def policy_of(self, cause: str) -> Policy:
        """Return the policy of a cause; for an unknown cause, review."""
        return self.policies.get(cause) or DEFAULT_POLICIES.get(cause, "review")


def check_policies(policies: Mapping[str, str]) -> None:
    """Raise `InvalidInputError` for an unknown cause or policy, or for a policy that the cause may not have."""
    for cause, policy in policies.items():
        if cause not in DEFAULT_POLICIES:
            near = difflib.get_close_matches(cause, DEFAULT_POLICIES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"causes are {', '.join(DEFAULT_POLICIES)}"
            raise InvalidInputError(f"policies.{cause}: no such cause; {hint}")
        if policy not in POLICIES:
            raise InvalidInputError(f"policies.{cause}: {policy!r} is no policy; give {', '.join(POLICIES)}")
        if policy == "correct" and cause in PAID_CAUSES:
            raise InvalidInputError(
                f'policies.{cause}: may not be "correct": these may be paid tokens, which only a person may take away. '
                "Give review or report, and correct single counters with `trueup drift accept`"
            )
        if policy == "correct" and cause in UNCORRECTABLE_CAUSES:
            raise InvalidInputError(
                f'policies.{cause}: may not be "correct": a machine can\'t correct it. Give review or report'
            )


class ReconcileSettings(BaseModel):
    """What a run may do without a person, as settings. Sizes are tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_correction: int | None = Field(
        default=None, ge=0, description="a larger drift is held for review; unset: no limit"
    )
    tolerance: int = Field(default=0, ge=0, description="a drift of at most this is ignored")
    min_age_seconds: int = Field(
        default=DEFAULT_MIN_AGE_SECONDS, ge=0, le=86_400, description="younger usage may still reach the counter"
    )
    policies: dict[str, Policy] = Field(default_factory=dict, description="correct, review or report, by cause")

    @field_validator("policies")
    @classmethod
    def _allowed(cls, policies: dict[str, Policy]) -> dict[str, Policy]:
        check_policies(policies)
        return policies

    def rules(self) -> Rules:
        """Return the settings as the rules of a run."""
        return Rules(**dict(self))
