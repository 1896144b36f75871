"""The causes of drift, their sentences for people, and the parts of an explanation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trueup.drift.detect import Drift

Cause = Literal[
    "counter_null",
    "counter_negative",
    "plan_negative",
    "counter_out_of_range",
    "missed_decrement",
    "lost_update",
    "stale_write",
    "double_decrement",
    "charged_not_logged",
    "host_decremented_our_charge",
    "failed_usage_charged",
    "clamped_at_zero",
    "credit_without_grant",
    "credited_twice",
    "renewal_without_new_window",
    "carried_over_tokens",
    "grant_not_in_counter",
    "period_reset",
    "burned_at_expiry",
    "manual_edit",
    "unexplained",
]
# From most to least certain. Without the journal, only what the counter itself shows is proven. A combination
# has the certainty of its least certain component.
Certainty = Literal["proven", "inferred", "possible"]
CERTAINTIES: tuple[Certainty, ...] = ("proven", "inferred", "possible")

# One sentence each for operators, in reports and `drift explain`.
CAUSE_SENTENCES: dict[str, str] = {
    "missed_decrement": "the host logged usage, but did not subtract it from the counter",
    "lost_update": "two decrements ran at the same moment, and the counter kept only one of them",
    "stale_write": "the application wrote a value that it had read before other changes, and so overwrote them",
    "double_decrement": "the host subtracted one log row twice, for example in a retried task",
    "charged_not_logged": "the host subtracted tokens, but logged no usage for them",
    "host_decremented_our_charge": "the host subtracted a call that trueup had subtracted already",
    "failed_usage_charged": "the host subtracted a failed request, which does not count",
    "clamped_at_zero": "the last request cost more than the counter held, and the counter stopped at zero",
    "credit_without_grant": "a purchase raised the counter, and no plan or grant includes these tokens",
    "credited_twice": "the host raised the counter a second time for one payment",
    "renewal_without_new_window": "a renewal added the plan's tokens, but no new period began",
    "carried_over_tokens": "an upgrade began a new period and kept the tokens left in the old one",
    "grant_not_in_counter": "a grant or a plan changed, and the counter did not follow",
    "period_reset": "a new period began, and the host's reset of the counter has not come, or came late",
    "burned_at_expiry": "the subscription ended, and the counter was set to zero",
    "manual_edit": "a person set the counter by hand",
    "counter_null": "the counter is empty",
    "counter_negative": "the counter is below zero",
    "plan_negative": "the plan states a number of tokens below zero, which may mean unlimited",
    "counter_out_of_range": "more tokens remain than the counter's column can hold",
    "unexplained": "no log row, decrement or payment explains it",
}

ACTION_SENTENCES: dict[str, str] = {
    "corrected": "trueup corrected the counter",
    "reported": "only reported; the counter did not change",
    "review": "a person decides: `trueup drift review`",
    "lost_race": "the host wrote the counter at the same moment; the next run checks it again",
    "waiting": "the usage is so recent that its decrement may still arrive; the next run checks it again",
    "tolerated": "within the tolerance; the counter did not change",
    "ignored": "a person decided to ignore it",
}

CERTAINTY_SENTENCES: dict[str, str] = {
    "proven": "the journal of the counter's changes proves it, or the counter itself",
    "inferred": "it follows from the rows, and nothing else fits them",
    "possible": "it fits the rows, and other causes may fit too",
}


@dataclass(frozen=True, kw_only=True)
class Component:
    """One cause and its share of a drift. `tokens` is positive if it made the counter too high.

    `evidence`: the rows that prove it, JSON-safe. `alternatives`: other causes that fit this component. `is_ignored`: a
    person decided to ignore it. `is_held`: an earlier run left it for a person, who has not decided yet.
    """

    cause: Cause
    tokens: int
    certainty: Certainty
    evidence: dict[str, Any] = field(default_factory=dict)
    alternatives: tuple[str, ...] = ()
    is_ignored: bool = False
    is_held: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the component as a drift row keeps it."""
        more: dict[str, Any] = {"alternatives": list(self.alternatives)} if self.alternatives else {}
        more |= {"ignored": True} if self.is_ignored else {}
        return {"cause": self.cause, "tokens": self.tokens, "certainty": self.certainty, **self.evidence, **more}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Component":
        """Return the component that a drift row keeps."""
        evidence = {**row}
        values = {name: evidence.pop(name) for name in ("cause", "tokens", "certainty")}
        alternatives = tuple(evidence.pop("alternatives", ()))
        return cls(**values, alternatives=alternatives, is_ignored=evidence.pop("ignored", False), evidence=evidence)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a counter drifted. Without components the drift is unexplained.

    `alternatives`: other causes that fit too. `in_flight`: tokens of recent log rows whose decrements may still arrive.
    `evidence`: figures that belong to no single component, JSON-safe. `by_component`: the journal accounts for the
    whole drift, so that each component can be decided by itself.
    """

    components: tuple[Component, ...] = ()
    alternatives: tuple[str, ...] = ()
    in_flight: int = 0
    evidence: dict[str, Any] = field(default_factory=dict)
    by_component: bool = False

    @property
    def cause(self) -> str:
        """The names of all causes, joined by "+", or "unexplained"."""
        return "+".join(dict.fromkeys(component.cause for component in self.components)) or "unexplained"

    @property
    def certainty(self) -> Certainty:
        """The certainty of the least certain component."""
        return max((component.certainty for component in self.components), key=CERTAINTIES.index, default="possible")

    def as_evidence(self) -> dict[str, Any]:
        """Return the JSON document that a drift row keeps."""
        components = [part.as_json() for part in self.components]
        alternatives = list(self.alternatives)
        return {**self.evidence, "components": components, "alternatives": alternatives, "in_flight": self.in_flight}

    def tokens_explained(self, drift: Drift) -> int:
        """Return how many of the drift's tokens the components explain, at most all of them."""
        return min(abs(drift.tokens), abs(sum(component.tokens for component in self.components)))


def cause_title(cause: str) -> str:
    """Return the name of a cause or a combination for people."""
    return cause.replace("_", " ").replace("+", " + ")


def cause_sentence(cause: str) -> str:
    """Return the sentence for a cause; its name if there is none."""
    return CAUSE_SENTENCES.get(cause, cause_title(cause))
