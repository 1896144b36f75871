"""Settings of reconciling: `TRUEUP_RECONCILE__MAX_CORRECTION`, or [reconcile] in trueup.toml."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trueup.settings.policies import DEFAULT_MIN_AGE_SECONDS, Policy, Rules, check_policies


class ReconcileSettings(BaseModel):
    """What a run may do by itself. Sizes are tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_correction: int | None = Field(
        default=None, ge=0, description="a counter that is off by more is held for review; unset means no limit"
    )
    tolerance: int = Field(default=0, ge=0, description="a counter that is off by at most so many is left alone")
    min_age_seconds: int = Field(
        default=DEFAULT_MIN_AGE_SECONDS, ge=0, le=86_400, description="younger usage may still reach the counter"
    )
    policies: dict[str, Policy] = Field(
        default_factory=dict, description="correct, review or report, by cause, where not the default"
    )

    @field_validator("policies")
    @classmethod
    def _allowed(cls, policies: dict[str, Policy]) -> dict[str, Policy]:
        check_policies(policies)
        return policies

    def rules(self) -> Rules:
        """Return them as the rules of a run."""
        return Rules(
            policies=self.policies,
            max_correction=self.max_correction,
            tolerance=self.tolerance,
            min_age_seconds=self.min_age_seconds,
        )
