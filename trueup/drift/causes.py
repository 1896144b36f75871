"""The causes of drift, and what an explanation is made of."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trueup.drift.detect import Drift

Cause = Literal[
    "counter_null",
    "counter_negative",
    "counter_out_of_range",
    "missed_decrement",
    "lost_update",
    "double_decrement",
    "charged_not_logged",
    "failed_usage_charged",
    "clamped_at_zero",
    "credit_without_grant",
    "renewal_without_new_window",
    "carried_over_tokens",
    "grant_not_in_counter",
    "burned_at_expiry",
    "manual_edit",
    "unexplained",
]
# In order: a combination is as certain as its least certain part.
Certainty = Literal["certain", "likely", "possible"]
CERTAINTIES: tuple[Certainty, ...] = ("certain", "likely", "possible")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One cause, and its share of a drift in tokens: positive where it made the counter too high.

    `evidence`: the rows that prove it (JSON-safe).
    """

    cause: Cause
    tokens: int
    certainty: Certainty
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What made a drift. No component: it is unexplained.

    `alternatives`: other causes that fit as well. `in_flight`: tokens of log rows so young that their decrements may
    still come. `evidence`: figures that belong to no one component (JSON-safe).
    """

    components: tuple[Component, ...] = ()
    alternatives: tuple[str, ...] = ()
    in_flight: int = 0
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def cause(self) -> str:
        """The cause's name, those of a combination joined by "+", or "unexplained"."""
        return "+".join(dict.fromkeys(component.cause for component in self.components)) or "unexplained"

    @property
    def certainty(self) -> Certainty:
        """How sure the name is: that of the least certain component."""
        return max((component.certainty for component in self.components), key=CERTAINTIES.index, default="possible")

    def as_evidence(self) -> dict[str, Any]:
        """Return everything that a drift row keeps of it, JSON-safe."""
        components = [
            {"cause": part.cause, "tokens": part.tokens, "certainty": part.certainty, **part.evidence}
            for part in self.components
        ]
        return {
            **self.evidence,
            "components": components,
            "alternatives": list(self.alternatives),
            "in_flight": self.in_flight,
        }

    def tokens_explained(self, drift: Drift) -> int:
        """Return how many of the drift's tokens the components account for, at most all of them."""
        return min(abs(drift.tokens), abs(sum(component.tokens for component in self.components)))
