"""The causes of drift in code and in words, and what an explanation is made of."""

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

# In words that an operator understands: one sentence each, for reports and `drift explain`.
CAUSE_SENTENCES: dict[str, str] = {
    "missed_decrement": "usage was logged, but never taken off the counter",
    "lost_update": "two decrements ran at the same moment, and the counter kept only one of them",
    "double_decrement": "one log row was taken off the counter twice, as a retried task does",
    "charged_not_logged": "tokens were taken off the counter, but no usage was logged for them",
    "failed_usage_charged": "a failed request was taken off the counter, though it does not count",
    "clamped_at_zero": "the last request cost more than the counter held, and the counter stopped at zero",
    "credit_without_grant": "the counter was raised by a purchase that the plan's tokens do not know of",
    "renewal_without_new_window": "a renewal added the plan's tokens, but the window did not begin anew",
    "carried_over_tokens": "an upgrade began a new window and kept what was left of the old one",
    "grant_not_in_counter": "a grant came or went, and the counter did not follow",
    "burned_at_expiry": "the subscription ended, and the counter was set to zero",
    "manual_edit": "someone set the counter by hand",
    "counter_null": "the counter is empty",
    "counter_negative": "the counter is below zero",
    "counter_out_of_range": "what remains is more than the counter's column can hold",
    "unexplained": "no row of the log, of the decrements or of the payments explains it",
}

ACTION_SENTENCES: dict[str, str] = {
    "corrected": "the counter was set right",
    "reported": "only reported, the counter was left alone",
    "review": "left for a person: `trueup drift review`",
    "lost_race": "the host wrote the counter at the same moment; the next run looks again",
    "waiting": "so young that its decrement may still come; the next run looks again",
    "tolerated": "within the tolerance, the counter was left alone",
    "ignored": "a person decided to leave it as it is",
}

CERTAINTY_SENTENCES: dict[str, str] = {
    "certain": "the rows prove it, and nothing else fits",
    "likely": "the rows fit it best",
    "possible": "the rows allow it, and other causes too",
}


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


def cause_title(cause: str) -> str:
    """Return a cause's name, or a combination's, as people read it."""
    return cause.replace("_", " ").replace("+", " + ")


def cause_sentence(cause: str) -> str:
    """Return what a cause means; its own name if there are no words for it."""
    return CAUSE_SENTENCES.get(cause, cause_title(cause))
