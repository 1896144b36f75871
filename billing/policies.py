"""What may be done about a drift: correct it, hold it for a person, or only report it. Pure: rules in, verdict out."""

from dataclasses import dataclass
from typing import Literal

from billing.causes import Explanation
from billing.drifts import Drift

Policy = Literal["correct", "review", "report"]
# From the boldest to the most careful: a combination gets the most careful of its causes'.
POLICIES: tuple[Policy, ...] = ("correct", "review", "report")

DEFAULT_POLICIES: dict[str, Policy] = {
    "counter_out_of_range": "report",
    "credit_without_grant": "review",
    "burned_at_expiry": "report",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`write`: the value to set the counter to, only with "correct". `reason`: the rule that decided, for people."""

    policy: Policy
    reason: str
    write: int | None = None


def decide(drift: Drift, explanation: Explanation) -> Verdict:
    """Say what may be done about a drift. What may be paid tokens is never "correct"."""
    causes = {component.cause for component in explanation.components}
    policies: list[Policy] = [DEFAULT_POLICIES.get(cause, "correct") for cause in causes]
    policy: Policy = max(policies, key=POLICIES.index) if policies else "correct"
    if not causes and "may_contain_a_plan_of" in explanation.evidence:
        policy = "review"
    return Verdict(
        policy=policy,
        reason=f"policy of {explanation.cause}",
        write=drift.expected if policy == "correct" else None,
    )
