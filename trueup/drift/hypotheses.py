"""Hypotheses about a drift: the causes that the evidence proves, and the causes that it allows. Pure.

If decrements are mapped, a row without a match has moved the counter. A purchase, carried-over tokens, and rows near
the base point or very recent ones may have moved it; the sum decides.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Certainty, Component, Explanation
from trueup.drift.detect import Drift
from trueup.drift.evidence import Carried, Evidence, Grant, Purchase


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A possible component of an explanation.

    `at`: its time (ISO), for the order. `alternatives`: other causes that fit its rows. `cost_used`, `cost_unused`: how
    improbable it is that it moved the counter, and that it did not. `purchase`: the index of the purchase that raised
    the counter or, with negative tokens, did not. `in_flight`: not a cause, but a decrement that may still arrive.
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
    """The candidates of a host with decrement rows.

    `unmatched`: rows without a match; all are part of the explanation. `possible`: each may be. `carried`: at most one.
    """

    unmatched: list[Candidate] = field(default_factory=list)
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


def combinations_of(
    possible: Sequence[Candidate], carried: Sequence[Candidate]
) -> Iterator[tuple[list[Candidate], float]]:
    """Yield each choice of possible candidates with at most one of `carried`, and its cost."""
    not_carried = max((one.cost_unused for one in carried), default=0.0)
    for flags in product((True, False), repeat=len(possible)):
        used = [one for one, flag in zip(possible, flags, strict=True) if flag]
        cost = sum(one.cost_used if flag else one.cost_unused for one, flag in zip(possible, flags, strict=True))
        yield used, cost + not_carried
        yield from (([*used, one], cost + one.cost_used) for one in carried)


def explanation_of(drift: Drift, chosen: Iterable[Candidate], alternatives: Iterable[str] = ()) -> Explanation:
    """Return the explanation by these candidates, in order of time; `alternatives`: besides their own."""
    chosen = sorted(chosen, key=lambda one: one.at)
    ordered = [one for one in chosen if not one.in_flight]
    causes = {one.component.cause for one in ordered}
    names = [*(name for one in ordered for name in one.alternatives), *alternatives]
    return Explanation(
        components=tuple(one.component for one in ordered),
        alternatives=tuple(name for name in dict.fromkeys(names) if name not in causes),
        in_flight=sum(one.tokens for one in chosen if one.in_flight),
        evidence=drift.figures,
    )


def less_certain(one: Candidate) -> Candidate:
    """Return the candidate; if it is inferred, with certainty "possible"."""
    if one.component.certainty != "inferred":
        return one
    return replace(one, component=replace(one.component, certainty="possible"))


def own_missed(evidence: Evidence) -> list[Candidate]:
    """Return trueup's charges that did not lower the counter."""
    own = evidence.own_missed
    if own is None:
        return []
    proof = {"by": "trueup: the counter was locked", "count": own.count, "rows": own.rows}
    return [candidate("missed_decrement", own.tokens, "inferred", at=own.rows[0]["at"], evidence=proof)]


def credits_of(evidence: Evidence) -> list[Candidate]:
    """Return the purchases that may have raised the counter.

    Of those just before the base point only the last few: more would crowd out likelier candidates.
    """
    open_purchases = [
        (place, purchase)
        for place, purchase in enumerate(evidence.purchases)
        if not purchase.granted and not purchase.opened_window
    ]
    settled = [place for place, purchase in open_purchases if purchase.settled]
    skipped = settled[: -weights.MAX_SETTLED_PURCHASES]
    return [_credit(purchase, place) for place, purchase in open_purchases if place not in skipped]


def _credit(purchase: Purchase, place: int) -> Candidate:
    cause: Cause = "renewal_without_new_window" if purchase.own_plan else "credit_without_grant"
    return candidate(
        cause,
        purchase.tokens,
        "inferred",
        at=purchase.at,
        evidence={"payments": [purchase.model_dump(include={"id", "reference", "tokens", "at", "kind"})]},
        # The counter may have included a purchase shortly before the base point, or the host added it a moment later.
        cost_used=weights.SETTLED_PURCHASE_USED if purchase.settled else weights.PURCHASE_USED,
        cost_unused=weights.SETTLED_PURCHASE_UNUSED if purchase.settled else weights.PURCHASE_UNUSED,
        purchase=place,
    )


def credited_twice(evidence: Evidence, chosen: Iterable[Candidate]) -> dict[int, Candidate]:
    """Return the second raises for one payment that may explain the rest, by their tokens.

    Of the payments that raised the counter once: `chosen` has them, or a grant or the present period covers them.
    """
    used = {one.purchase for one in chosen if one.purchase is not None and one.tokens > 0}
    return {
        purchase.tokens: candidate(
            "credited_twice",
            purchase.tokens,
            "possible",
            at=purchase.at,
            alternatives=("manual_edit",),
            evidence={"payments": [purchase.model_dump(include={"id", "reference", "tokens", "at", "kind"})]},
        )
        for place, purchase in enumerate(evidence.purchases)
        if purchase.kind != "grant" and (purchase.granted or purchase.opened_window or place in used)
    }


def grants_of(evidence: Evidence) -> list[Candidate]:
    """Return the grants that the counter may not have followed, except grants that a known purchase represents."""
    places = {purchase.id: place for place, purchase in enumerate(evidence.purchases) if purchase.kind == "grant"}
    return [
        _grant(grant, places.get(str(grant.id)))
        for grant in evidence.grants
        if grant.ended_since or not grant.given_since or str(grant.id) in places
    ]


def _grant(grant: Grant, place: int | None) -> Candidate:
    tokens = grant.tokens if grant.ended_since else -grant.tokens
    note = "ended, and the counter kept its tokens" if grant.ended_since else "added, and the counter does not show it"
    return candidate(
        "grant_not_in_counter",
        tokens,
        "possible",
        at=grant.granted_at,
        evidence={"grants": [grant.model_dump()], "note": note},
        cost_used=weights.GRANT_NOT_IN_COUNTER,
        purchase=place,
    )


def carried_of(evidence: Evidence, plan_sizes: frozenset[int]) -> list[Candidate]:
    """Return the amounts that an upgrade may have kept of each earlier plan, by the log and by the decrements.

    `plan_sizes`: the tokens that plans include, tried if the earlier plan is not known. A plan that is bought while
    another one runs is an upgrade, which probably keeps the other's tokens. Of a plan that had ended, a host seldom
    keeps them.
    """
    found: dict[int, Candidate] = {}
    for carried in evidence.carried:
        sizes = [carried.tokens] if carried.tokens is not None else sorted(plan_sizes)
        for size in sizes:
            for left in (size - carried.used, size - carried.lowered):
                if left > 0:
                    found.setdefault(left, _carried(carried, size, left))
    return list(found.values())[: weights.MAX_CARRIED]


def _carried(carried: Carried, size: int, left: int) -> Candidate:
    guessed = carried.tokens is None
    proof: dict[str, Any] = {
        "upgrade": carried.upgrade,
        "before": {**carried.model_dump(exclude={"upgrade"}), "tokens": size},
    }
    if guessed:
        proof["note"] = "no earlier payment is known: the sizes of the plans on sale are tried"
    known = weights.CARRIED_EARLIER_PLAN * (carried.place - 1)
    known += weights.CARRIED_SAME_PLAN if carried.same_plan else 0.0
    known += weights.CARRIED_ENDED_PLAN if carried.ran_out else 0.0
    is_seldom = carried.same_plan or carried.ran_out
    return candidate(
        "carried_over_tokens",
        left,
        "possible" if guessed or is_seldom else "inferred",
        # A renewal seldom keeps tokens: a manual edit may have added the same number.
        alternatives=("manual_edit",) if is_seldom else (),
        at=carried.upgrade["at"],
        evidence=proof,
        cost_used=weights.CARRIED_GUESSED if guessed else known,
        cost_unused=0.0 if guessed or is_seldom else weights.NOT_CARRIED,
    )
