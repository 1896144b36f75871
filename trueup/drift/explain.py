"""Why a counter drifted: the causes whose shares add up to it, with their proof. Pure: drift in, explanation out.

The counter is explained when observed = original - consumed + the sum of the causes' tokens. What the rows prove is
taken as it is; among what they only allow, the set that makes the sum come out and strains belief least is chosen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Certainty, Component, Explanation
from trueup.drift.clamping import Clamp, clamps
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence
from trueup.drift.explain_by_amounts import explain_by_amounts
from trueup.drift.explain_by_rows import ledger_candidates
from trueup.drift.hypotheses import Candidate, Candidates, candidate
from trueup.drift.lost_updates import Losses, losses_by_tokens


def explain(drift: Drift, *, plan_sizes: frozenset[int], counter_limit: int, now: datetime) -> Explanation:
    """Name what made a drift.

    `plan_sizes`: the token amounts that plans sell. `counter_limit`: the largest value that the counter's column takes.
    """
    if drift.expected > counter_limit:
        return _whole("counter_out_of_range", drift, "certain", {"counter_limit": counter_limit})
    if drift.observed is None:
        return _whole("counter_null", drift, "certain")
    solution = None
    if drift.evidence.decrements_mapped:
        solution = _best(drift, plan_sizes)
    if solution and solution.exact and drift.observed >= 0 and not _is_lucky(solution):
        return solution.as_explanation(drift)
    ended = drift.end_date is not None and drift.end_date < now
    if drift.observed == 0 and drift.tokens < 0 and (ended or not drift.is_active):
        reason = "the subscription's end has passed" if ended else "the subscription is not active"
        return _whole("burned_at_expiry", drift, "likely", {"note": reason}, alternatives=("manual_edit",))
    if solution:
        return solution.as_explanation(drift)
    return explain_by_amounts(drift, plan_sizes)


def _whole(
    cause: Cause,
    drift: Drift,
    certainty: Certainty,
    evidence: dict[str, Any] | None = None,
    alternatives: tuple[str, ...] = (),
) -> Explanation:
    part = Component(cause=cause, tokens=drift.tokens, certainty=certainty, evidence=evidence or {})
    return Explanation(components=(part,), alternatives=alternatives, evidence=drift.figures)


@dataclass(frozen=True, kw_only=True)
class _Solution:
    """Candidates that add up, with what they cost. `exact` False: a rest was put down to a hand's edit."""

    chosen: tuple[Candidate, ...]
    cost: float
    exact: bool

    @property
    def causes(self) -> frozenset[str]:
        return frozenset(one.component.cause for one in self.chosen if not one.in_flight)

    def as_explanation(self, drift: Drift) -> Explanation:
        ordered = sorted((one for one in self.chosen if not one.in_flight), key=lambda one: one.at)
        alternatives = [name for one in ordered for name in one.alternatives]
        return Explanation(
            components=tuple(one.component for one in ordered),
            alternatives=tuple(name for name in dict.fromkeys(alternatives) if name not in self.causes),
            in_flight=sum(one.tokens for one in self.chosen if one.in_flight),
            evidence=drift.figures,
        )


def _is_lucky(solution: _Solution) -> bool:
    return any(one.component.cause == "lost_update" for one in solution.chosen)


def _best(drift: Drift, plan_sizes: frozenset[int]) -> _Solution:
    """Return the solution that costs least, less certain where another comes close under other names."""
    evidence = drift.evidence
    found = ledger_candidates(evidence, plan_sizes)
    solutions = list(_solutions(drift, found, plan_sizes))
    exact = sorted((one for one in solutions if one.exact), key=lambda one: one.cost)
    best = min(solutions, key=lambda one: one.cost)
    close = [one for one in exact if one.causes != best.causes and one.cost <= best.cost + weights.CLOSE]
    if not best.exact and _ledger_is_no_story(evidence, found, best.chosen[-1].tokens):
        return _Solution(chosen=(), cost=best.cost, exact=False)
    others = {name for one in close for name in one.causes - best.causes}
    if not others and not any(one.alternatives for one in best.chosen):
        return best
    return replace(best, chosen=tuple(_doubted(one, tuple(sorted(others)), close) for one in best.chosen))


def _doubted(one: Candidate, others: tuple[str, ...], close: Sequence[_Solution]) -> Candidate:
    """A cause that every close solution names as well is none the less certain."""
    if all(one.component in [other.component for other in solution.chosen] for solution in close):
        return one
    part = one.component
    certainty: Certainty = "likely" if part.certainty == "certain" else part.certainty
    return replace(one, component=replace(part, certainty=certainty), alternatives=(*one.alternatives, *others))


def _ledger_is_no_story(evidence: Evidence, found: Candidates, rest: int) -> bool:
    """The decrement rows don't tell what happened to the counter: most usage has none, and yet was subtracted."""
    missed = sum(one.tokens for one in found.proven if one.component.cause == "missed_decrement")
    few = evidence.logged_rows >= weights.MIN_LOGGED_ROWS and evidence.lowered_rows * 2 < evidence.logged_rows
    return few and missed > 0 and -rest * 2 > missed


def _solutions(drift: Drift, found: Candidates, plan_sizes: frozenset[int]) -> Iterator[_Solution]:
    """Yield each way to make the sum come out, and each with a rest for a hand's edit."""
    evidence = drift.evidence
    # What strains belief least is tried both ways; of that the newest.
    likely = sorted(range(len(found.possible)), key=lambda place: (found.possible[place].cost_used, -place))
    possible = [found.possible[place] for place in sorted(likely[: weights.MAX_POSSIBLE])]
    # More purchases than that have raised the counter, as purchases do.
    more = [found.possible[place] for place in sorted(likely[weights.MAX_POSSIBLE :])]
    sure = [one for one in more if one.purchase is not None and not one.cost_used]
    lost = losses_by_tokens(evidence, plan_sizes)
    unseen = frozenset() if evidence.purchases_mapped else plan_sizes
    not_carried = max((one.cost_unused for one in found.carried), default=0.0)
    for flags in product((True, False), repeat=len(possible)):
        used = [one for one, flag in zip(possible, flags, strict=True) if flag]
        cost = sum(one.cost_used if flag else one.cost_unused for one, flag in zip(possible, flags, strict=True))
        for carried in (None, *found.carried):
            chosen = [*found.proven, *sure, *used, *([carried] if carried else [])]
            base_cost = cost + (carried.cost_used if carried else not_carried)
            for clamp in clamps(evidence, chosen):
                taken = (*chosen, *([clamp.candidate] if clamp.candidate else []))
                rest = drift.surplus - sum(one.tokens for one in taken)
                yield from _closed(drift, taken, base_cost, clamp, rest, lost, unseen)


def _closed(
    drift: Drift,
    taken: tuple[Candidate, ...],
    cost: float,
    clamp: Clamp,
    rest: int,
    lost: dict[int, Losses],
    unseen: frozenset[int],
) -> Iterator[_Solution]:
    cost += clamp.cost
    if (drift.observed or 0) < 0:
        negative = candidate("counter_negative", rest, "certain", at="~")
        yield _Solution(chosen=(*taken, negative), cost=cost, exact=rest == 0)
        return
    if rest == 0:
        yield _Solution(chosen=taken, cost=cost, exact=True)
        return
    if rest in unseen:
        yield _Solution(chosen=(*taken, _bought(rest)), cost=cost + weights.UNSEEN_PURCHASE, exact=True)
    if rest in lost:
        losses = lost[rest]
        chosen = losses.lost
        if losses.doubtful or clamp.candidate:
            chosen = tuple(replace(one, alternatives=("manual_edit",)) for one in chosen)
        yield _Solution(chosen=(*taken, *chosen), cost=cost + losses.cost, exact=True)
    digits = len(str(abs(rest)).rstrip("0"))
    strain = math.log10(abs(rest)) + weights.MANUAL_EDIT_DIGIT * max(0, digits - 2) + clamp.cost_before_edit
    yield _Solution(chosen=(*taken, _manual_edit(rest)), cost=cost + weights.MANUAL_EDIT + strain, exact=False)


def _bought(tokens: int) -> Candidate:
    """Payments are not mapped: what is as large as a plan may have been bought."""
    others = ("renewal_without_new_window", "manual_edit")
    return candidate("credit_without_grant", tokens, "likely", at="~", alternatives=others,
                     evidence={"plans_of_this_size": True})  # fmt: skip


def _manual_edit(rest: int) -> Candidate:
    proof = {"note": "no row accounts for it: log, decrements and purchases were considered"}
    return candidate("manual_edit", rest, "likely", at="~", evidence=proof)
