"""What evidence may mean for a counter: causes that its rows prove, and causes that they allow. Pure.

With the host's decrement rows at hand, a row without its partner must have moved the counter. A purchase, what an
upgrade kept, rows at the base point or too young to tell only may have: whether they did, the sum decides.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Certainty, Component
from trueup.drift.evidence import Carried, Evidence, Grant, Purchase


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A component that may be part of an explanation, `at` a time (ISO), with other names that fit its rows as well.

    `cost_used`, `cost_unused`: how much it strains belief that it moved the counter, and that it did not; the
    explanation that costs least wins. `purchase`: its place among the purchases, in order of time: the counter was
    raised by it, or, with negative tokens, was not. `in_flight`: no cause, only a decrement that has not come yet.
    """

    component: Component
    at: str = ""
    alternatives: tuple[str, ...] = ()
    cost_used: float = 0.0
    cost_unused: float = 0.0
    purchase: int | None = None
    in_flight: bool = False

    @property
    def tokens(self) -> int:
        return self.component.tokens


@dataclass(kw_only=True)
class Candidates:
    """`proven`: the rows can't be there without them. `possible`: each may be part of it. `carried`: at most one is."""

    proven: list[Candidate] = field(default_factory=list)
    possible: list[Candidate] = field(default_factory=list)
    carried: list[Candidate] = field(default_factory=list)


def candidate(
    cause: Cause,
    tokens: int,
    certainty: Certainty,
    *,
    at: str = "",
    alternatives: tuple[str, ...] = (),
    evidence: dict[str, Any] | None = None,
    **more: Any,
) -> Candidate:
    part = Component(cause=cause, tokens=tokens, certainty=certainty, evidence=evidence or {})
    return Candidate(component=part, at=at, alternatives=alternatives, **more)


def less_certain(one: Candidate) -> Candidate:
    """Return it as no more than likely."""
    certainty: Certainty = "likely" if one.component.certainty == "certain" else one.component.certainty
    return replace(one, component=replace(one.component, certainty=certainty))


def own_missed(evidence: Evidence) -> list[Candidate]:
    """Return trueup's own charges that could not lower the counter."""
    own = evidence.own_missed
    if own is None:
        return []
    proof = {"by": "trueup: the counter was locked", "count": own.count, "rows": own.rows}
    return [candidate("missed_decrement", own.tokens, "certain", at=own.rows[0]["at"], evidence=proof)]


def credits_of(evidence: Evidence) -> list[Candidate]:
    """Return the purchases that may have raised the counter. A host that sells tokens adds them: that is no strain.

    Of those just before the base point the last few: more of them only stand in the way of likelier things.
    """
    places = [
        place
        for place, purchase in enumerate(evidence.purchases)
        if not purchase.granted and not purchase.opened_window
    ]
    before = [place for place in places if evidence.purchases[place].settled]
    return [
        _credit(evidence.purchases[place], place)
        for place in places
        if place not in before[: -weights.MAX_SETTLED_PURCHASES]
    ]


def _credit(purchase: Purchase, place: int) -> Candidate:
    cause: Cause = "renewal_without_new_window" if purchase.own_plan else "credit_without_grant"
    return candidate(
        cause,
        purchase.tokens,
        "certain",
        at=purchase.at,
        evidence={"payments": [purchase.model_dump(include={"id", "reference", "tokens", "at", "kind"})]},
        # Shortly before the base point, it may have been in the counter then, or come a moment later.
        cost_used=weights.SETTLED_PURCHASE_USED if purchase.settled else weights.PURCHASE_USED,
        cost_unused=weights.SETTLED_PURCHASE_UNUSED if purchase.settled else weights.PURCHASE_UNUSED,
        purchase=place,
    )


def grants_of(evidence: Evidence) -> list[Candidate]:
    """Return the grants that the counter may not have followed, but for those that a purchase in sight stands for."""
    places = {purchase.id: place for place, purchase in enumerate(evidence.purchases) if purchase.kind == "grant"}
    return [
        _grant(grant, places.get(str(grant.id)))
        for grant in evidence.grants
        if grant.ended_since or not grant.given_since or str(grant.id) in places
    ]


def _grant(grant: Grant, place: int | None) -> Candidate:
    tokens = grant.tokens if grant.ended_since else -grant.tokens
    note = "ended, and the counter kept it" if grant.ended_since else "given, and the counter does not show it"
    return candidate(
        "grant_not_in_counter",
        tokens,
        "likely",
        at=grant.granted_at,
        evidence={"grants": [grant.model_dump()], "note": note},
        cost_used=weights.GRANT_NOT_IN_COUNTER,
        purchase=place,
    )


def carried_of(evidence: Evidence, plan_sizes: frozenset[int]) -> list[Candidate]:
    """Return what an upgrade may have kept, each figure once: by the log or by the decrements, of each earlier plan.

    What had run out was not there to be kept. A plan that is bought while another one runs is an upgrade: what was left
    of that one is expected to be kept.
    """
    found: dict[int, Candidate] = {}
    for carried in evidence.carried:
        sizes = [carried.tokens] if carried.tokens is not None else sorted(plan_sizes)
        for size in sizes:
            for left in (size - carried.used, size - carried.lowered):
                if left > 0 and not carried.ran_out:
                    found.setdefault(left, _carried(carried, size, left))
    return list(found.values())[: weights.MAX_CARRIED]


def _carried(carried: Carried, size: int, left: int) -> Candidate:
    guessed = carried.tokens is None
    proof: dict[str, Any] = {
        "upgrade": carried.upgrade,
        "before": {**carried.model_dump(exclude={"upgrade"}), "tokens": size},
    }
    if guessed:
        proof["note"] = "no earlier payment: the size of an earlier plan is taken from those on sale"
    known = weights.CARRIED_EARLIER_PLAN * (carried.place - 1)
    known += weights.CARRIED_SAME_PLAN if carried.same_plan else 0.0
    return candidate(
        "carried_over_tokens",
        left,
        "likely" if guessed or carried.same_plan else "certain",
        # A plan that is renewed seldom keeps anything: a hand may have added just as much.
        alternatives=("manual_edit",) if carried.same_plan else (),
        at=carried.upgrade["at"],
        evidence=proof,
        cost_used=weights.CARRIED_GUESSED if guessed else known,
        cost_unused=0.0 if guessed or carried.same_plan else weights.NOT_CARRIED,
    )
