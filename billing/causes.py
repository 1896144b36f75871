"""Why a counter drifted, as far as the evidence goes. Pure: drift in, explanation out."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from billing.drifts import Drift, SameSizeRows

Cause = Literal[
    "counter_null",
    "counter_negative",
    "counter_out_of_range",
    "missed_decrement",
    "double_decrement",
    "failed_usage_charged",
    "credit_without_grant",
    "burned_at_expiry",
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


def explain(drift: Drift, *, plan_sizes: frozenset[int], counter_limit: int, now: datetime) -> Explanation:
    """Name what made a drift.

    `plan_sizes`: the token amounts that plans sell. `counter_limit`: the largest value that the counter's column takes.
    """
    figures = {"original": drift.original, "consumed": drift.consumed}
    if drift.expected > counter_limit:
        return _one("counter_out_of_range", drift, figures, {"counter_limit": counter_limit}, certainty="certain")
    if drift.observed is None:
        return _one("counter_null", drift, figures, certainty="certain")
    if drift.observed < 0:
        return _one("counter_negative", drift, figures, certainty="certain")
    if drift.tokens > 0:
        return _overstated(drift, plan_sizes, figures)
    return _understated(drift, now, figures)


def _overstated(drift: Drift, plan_sizes: frozenset[int], figures: dict[str, int]) -> Explanation:
    """The counter shows tokens that the log says are gone."""
    if (drift.observed or 0) > drift.original or drift.tokens in plan_sizes:
        return _one("credit_without_grant", drift, figures, {"plans_of_this_size": drift.tokens in plan_sizes})
    if drift.counted_rows.matches:
        return _one("missed_decrement", drift, figures, _rows(drift.counted_rows))
    smaller = [size for size in plan_sizes if size < drift.tokens]
    # A credit and a decrement may hide in one difference.
    return Explanation(evidence={**figures, **({"may_contain_a_plan_of": max(smaller)} if smaller else {})})


def _understated(drift: Drift, now: datetime, figures: dict[str, int]) -> Explanation:
    """The counter hides tokens that are left."""
    ended = drift.end_date is not None and drift.end_date < now
    if drift.observed == 0 and (ended or not drift.is_active):
        return _one("burned_at_expiry", drift, figures)
    if drift.failed_rows.matches:
        return _one("failed_usage_charged", drift, figures, _rows(drift.failed_rows))
    if drift.counted_rows.matches:
        return _one("double_decrement", drift, figures, _rows(drift.counted_rows))
    return Explanation(evidence=figures)


def _one(
    cause: Cause,
    drift: Drift,
    figures: dict[str, int],
    evidence: dict[str, Any] | None = None,
    *,
    certainty: Certainty = "likely",
) -> Explanation:
    part = Component(cause=cause, tokens=drift.tokens, certainty=certainty, evidence=evidence or {})
    return Explanation(components=(part,), evidence=figures)


def _rows(rows: SameSizeRows) -> dict[str, Any]:
    """The rows that fit. More than one match: any of them may be the one."""
    return {"log_rows_of_this_size": rows.matches, "newest": rows.newest}
