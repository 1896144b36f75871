"""Explain a drift: find the causes whose tokens add up to it, with their proof. Pure: drift in, explanation out.

An explanation adds up: observed = original - consumed + the sum of the causes' tokens, decrements in flight included.
Where the journal reaches back, it accounts for each change (`explain_by_journal`). Otherwise rows without a match are
part of each combination of causes, and a manual edit explains what a combination leaves; the cheapest combination wins.
Without decrement rows, or with too few, sizes decide (`explain_by_amounts`).

The certainty of an explanation is that of its least certain component: "proven" by the journal, or by the counter
itself (it is empty or below zero, or its column can't hold the right value); "inferred" from rows if nothing else fits
them; else "possible".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Certainty, Component, Explanation
from trueup.drift.clamping import Clamp, clamps
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence
from trueup.drift.explain_by_amounts import explain_by_amounts
from trueup.drift.explain_by_rows import ledger_candidates
from trueup.drift.history import explain_by_journal, journal_position
from trueup.drift.hypotheses import (
    Candidate,
    Candidates,
    candidate,
    combinations_of,
    credited_twice,
    explanation_of,
    less_certain,
)
from trueup.drift.lost_updates import Losses, losses_by_tokens
from trueup.drift.period_reset import explain_reset


def explain(drift: Drift, *, plan_sizes: frozenset[int], counter_limit: int, now: datetime) -> Explanation:
    """Return the causes of a drift.

    `plan_sizes`: the tokens that plans include. `counter_limit`: the largest value that the counter's column holds, in
    tokens. `now`: decides whether the subscription has ended.
    """
    if drift.plan_kind == "negative":
        return _whole("plan_negative", drift, "possible", {"note": "the plan's figure may mean unlimited"})
    if drift.written(drift.expected) > counter_limit:
        return _whole("counter_out_of_range", drift, "proven", {"counter_limit": counter_limit})
    if drift.observed is None:
        return _whole("counter_null", drift, "proven")
    told = explain_by_journal(drift, plan_sizes)
    return told or _with_position(drift, _inferred(drift, plan_sizes, now))


def _inferred(drift: Drift, plan_sizes: frozenset[int], now: datetime) -> Explanation:
    """Return the causes that follow from the rows and the sizes that are there, without a journal."""
    solution = None
    if drift.evidence.decrements_mapped:
        solution = _best(drift, plan_sizes)
    if solution and solution.exact and not drift.is_negative and "lost_update" not in solution.causes:
        return explanation_of(drift, solution.chosen)
    ended = drift.end_date is not None and drift.end_date < now
    if drift.observed == 0 and drift.tokens < 0 and (ended or not drift.is_active):
        reason = "the subscription's end has passed" if ended else "the subscription is not active"
        return _whole("burned_at_expiry", drift, "possible", {"note": reason}, alternatives=("manual_edit",))
    reset = None if solution and solution.exact else explain_reset(drift, plan_sizes)
    if reset is not None:
        return reset
    if solution and solution.chosen:
        return explanation_of(drift, solution.chosen)
    # Without decrement rows, or with too few of them.
    return explain_by_amounts(drift, plan_sizes)


def _with_position(drift: Drift, explanation: Explanation) -> Explanation:
    """Note where the journal stands, so that the next run can go on from this explanation."""
    position = journal_position(drift, in_flight=explanation.in_flight > 0)
    return replace(explanation, evidence={**explanation.evidence, **position})


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
    """Candidates that add up to the drift, and their cost. `exact` False: a manual edit explains a remainder."""

    chosen: tuple[Candidate, ...]
    cost: float
    exact: bool

    @property
    def causes(self) -> frozenset[str]:
        return frozenset(one.component.cause for one in self.chosen if not one.in_flight)


def _best(drift: Drift, plan_sizes: frozenset[int]) -> _Solution:
    """Return the cheapest solution; less certain if other causes cost little more."""
    evidence = drift.evidence
    found = ledger_candidates(evidence, plan_sizes)
    solutions = list(_solutions(drift, found, plan_sizes))
    exact = sorted((one for one in solutions if one.exact), key=lambda one: one.cost)
    best = min(solutions, key=lambda one: one.cost)
    close = [one for one in exact if one.causes != best.causes and one.cost <= best.cost + weights.CLOSE]
    if not best.exact and _decrements_incomplete(evidence, found, best.chosen[-1].tokens):
        return _Solution(chosen=(), cost=best.cost, exact=False)
    others = {name for one in close for name in one.causes - best.causes}
    if not others and not any(one.alternatives for one in best.chosen):
        return best
    return replace(best, chosen=tuple(_doubted(one, tuple(sorted(others)), close) for one in best.chosen))


def _doubted(one: Candidate, others: tuple[str, ...], close: Sequence[_Solution]) -> Candidate:
    """Lower the certainty of a candidate, unless every close solution contains it too."""
    if all(one.component in [other.component for other in solution.chosen] for solution in close):
        return one
    return replace(less_certain(one), alternatives=(*one.alternatives, *others))


def _decrements_incomplete(evidence: Evidence, found: Candidates, rest: int) -> bool:
    """Return whether the host subtracts usage without decrement rows: most usage has none, yet the counter fell."""
    missed = sum(one.tokens for one in found.unmatched if one.component.cause == "missed_decrement")
    few = evidence.logged_rows >= weights.MIN_LOGGED_ROWS and evidence.lowered_rows * 2 < evidence.logged_rows
    return few and missed > 0 and -rest * 2 > missed


def _solutions(drift: Drift, found: Candidates, plan_sizes: frozenset[int]) -> Iterator[_Solution]:
    """Yield each combination that makes the sum exact, and each with a manual edit for its remainder."""
    evidence = drift.evidence
    # The cheapest candidates, the newest first, are tried as used and as unused.
    likely = sorted(range(len(found.possible)), key=lambda place: (found.possible[place].cost_used, -place))
    possible = [found.possible[place] for place in sorted(likely[: weights.MAX_POSSIBLE])]
    # Further purchases count as used: purchases raise the counter.
    more = [found.possible[place] for place in sorted(likely[weights.MAX_POSSIBLE :])]
    sure = [one for one in more if one.purchase is not None and not one.cost_used]
    lost = losses_by_tokens(evidence, plan_sizes)
    unseen = frozenset() if evidence.purchases_mapped else plan_sizes
    for used, cost in combinations_of(possible, found.carried):
        chosen = [*found.unmatched, *sure, *used]
        for clamp in clamps(evidence, chosen):
            taken = (*chosen, *([clamp.candidate] if clamp.candidate else []))
            rest = drift.surplus - sum(one.tokens for one in taken)
            yield from _closed(drift, taken, cost, clamp, rest, lost, unseen)


def _closed(
    drift: Drift,
    taken: tuple[Candidate, ...],
    cost: float,
    clamp: Clamp,
    rest: int,
    lost: dict[int, Losses],
    unseen: frozenset[int],
) -> Iterator[_Solution]:
    """Yield the solutions for these candidates and the remainder `rest`: none, or what else raised the counter."""
    cost += clamp.cost
    if drift.is_negative:
        negative = candidate("counter_negative", rest, "proven", at="~")
        yield _Solution(chosen=(*taken, negative), cost=cost, exact=rest == 0)
        return
    if rest == 0:
        yield _Solution(chosen=taken, cost=cost, exact=True)
        return
    twice = credited_twice(drift.evidence, taken)
    if rest in twice:
        yield _Solution(chosen=(*taken, twice[rest]), cost=cost + weights.CREDITED_TWICE, exact=True)
    if rest in unseen:
        yield _Solution(chosen=(*taken, _bought(rest)), cost=cost + weights.UNSEEN_PURCHASE, exact=True)
    if rest in lost:
        losses = lost[rest]
        chosen = losses.lost
        if losses.doubtful or clamp.candidate:
            chosen = tuple(replace(one, alternatives=("manual_edit",)) for one in chosen)
        yield _Solution(chosen=(*taken, *chosen), cost=cost + losses.cost, exact=True)
    digits = len(str(abs(rest)).rstrip("0"))
    proof = {"note": "no log row, decrement or purchase explains it"}
    edit = candidate("manual_edit", rest, "possible", at="~", evidence=proof)
    cost += weights.MANUAL_EDIT + math.log10(abs(rest)) + weights.MANUAL_EDIT_DIGIT * max(0, digits - 2)
    yield _Solution(chosen=(*taken, edit), cost=cost + clamp.cost_before_edit, exact=False)


def _bought(tokens: int) -> Candidate:
    """Return the purchase of a plan of this size, for a host whose payments are not mapped."""
    others = ("renewal_without_new_window", "manual_edit")
    return candidate("credit_without_grant", tokens, "possible", at="~", alternatives=others,
                     evidence={"plans_of_this_size": True})  # fmt: skip
