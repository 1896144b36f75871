"""Explain a drift by amounts alone, for a host without decrement rows; the result is never certain. Pure.

A log row, a purchase or a pair of log rows of the drift's size explains it. Without decrement rows a missed decrement
looks like a lost update, and a double decrement like usage that was not logged, so alternatives are named too.
"""

from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Component, Explanation
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence, Match
from trueup.drift.hypotheses import (
    Candidate,
    candidate,
    carried_of,
    combinations_of,
    credited_twice,
    credits_of,
    explanation_of,
    grants_of,
    less_certain,
    own_missed,
)

PAID = ("credit_without_grant", "renewal_without_new_window", "carried_over_tokens")


def explain_by_amounts(drift: Drift, plan_sizes: frozenset[int]) -> Explanation:
    """Return the explanation by the sizes of rows. `plan_sizes`: the tokens that plans include."""
    evidence = drift.evidence
    if drift.is_negative:
        part = Component(cause="counter_negative", tokens=drift.tokens, certainty="proven")
        return Explanation(components=(part,), evidence=drift.figures)
    if evidence.young and 0 < drift.tokens <= evidence.young.tokens:
        return Explanation(in_flight=drift.tokens, evidence=drift.figures)
    chosen, alternatives = _chosen(drift, plan_sizes)
    if not chosen:
        others, more = _unexplained(drift, plan_sizes)
        return Explanation(alternatives=others, evidence={**drift.figures, **more})
    return explanation_of(drift, chosen, alternatives)


def _chosen(drift: Drift, plan_sizes: frozenset[int]) -> tuple[list[Candidate], tuple[str, ...]]:
    evidence = drift.evidence
    own = own_missed(evidence)
    rest = drift.surplus - sum(one.tokens for one in own)
    if rest == 0:
        return own, ()
    matches = {match.tokens: match for match in evidence.matches if match.counted or match.tokens < 0}
    if evidence.purchases_mapped or evidence.grants:
        found, others = _with_purchases(drift, plan_sizes, rest, matches)
        if found and (evidence.purchases_mapped or any(one.component.cause == "grant_not_in_counter" for one in found)):
            return own + found, others
    if not evidence.purchases_mapped and (rest in plan_sizes or (drift.observed or 0) > drift.original):
        names: list[str] = [cause for cause in PAID[1:] if cause != "carried_over_tokens" or evidence.used_before]
        names += ["missed_decrement", "lost_update"] if rest in matches and matches[rest].counted else []
        proof = {"plans_of_this_size": rest in plan_sizes}
        return [*own, candidate("credit_without_grant", rest, "possible", evidence=proof)], (*names, "manual_edit")
    if rest in matches:
        return [*own, _of_match(matches[rest])], _hidden_purchase(drift, rest, plan_sizes)
    pair = _of_pair(evidence, rest)
    return [*own, *pair] if pair else [], ()


def _hidden_purchase(drift: Drift, rest: int, plan_sizes: frozenset[int]) -> tuple[str, ...]:
    """Return causes without a row that may have this size too: a purchase partly used, or carried-over tokens."""
    evidence = drift.evidence
    unseen = evidence.credit_may_be_late if evidence.purchases_mapped else plan_sizes
    names = ["credit_without_grant"] if any(size <= rest for size in unseen) else []
    names += ["carried_over_tokens"] if rest > 0 and evidence.used_before and not evidence.purchases_mapped else []
    return tuple(names)


def _with_purchases(
    drift: Drift, plan_sizes: frozenset[int], rest: int, matches: dict[int, Match]
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Return the purchases, grants and kept tokens that add up to `rest`, maybe with a log row; and alternatives."""
    evidence = drift.evidence
    possible = [*credits_of(evidence), *grants_of(evidence)][-weights.MAX_CREDITS :]
    kept = carried_of(evidence, plan_sizes)
    found: list[tuple[float, list[Candidate]]] = []
    for taken, cost in combinations_of(possible, kept):
        left = rest - sum(one.tokens for one in taken)
        if left == 0:
            found.append((cost, taken))
        elif left in matches:
            found.append((cost + weights.AMOUNT_OF_A_ROW, [*taken, _of_match(matches[left])]))
        elif left in (twice := credited_twice(evidence, taken)):
            found.append((cost + weights.CREDITED_TWICE, [*taken, twice[left]]))
    if not found:
        return [], ()
    best = min(found, key=lambda one: one[0])[1]
    others = {one.component.cause for _, taken in found for one in taken}
    # An unused purchase or kept tokens may be part of it, together with a cause that left no row.
    others |= {one.component.cause for one in possible if one.cost_unused}
    others |= {one.component.cause for one in kept if not one.component.evidence["before"]["ran_out"]}
    # A size is no proof: a decrement's row might have shown otherwise.
    return [less_certain(one) for one in best], tuple(sorted(others - {one.component.cause for one in best}))


def _of_match(match: Match) -> Candidate:
    """Return the cause for log rows of the drift's size; any one of them may be the row."""
    others: tuple[str, ...]
    if match.tokens > 0:
        cause: Cause = "missed_decrement"
        count, rows, others = match.counted, match.counted_rows, ("lost_update",)
    elif match.failed:
        cause = "failed_usage_charged"
        count, rows, others = match.failed, match.failed_rows, ("charged_not_logged",)
        others = ("double_decrement", *others) if match.counted else others
    else:
        cause = "double_decrement"
        count, rows, others = match.counted, match.counted_rows, ("charged_not_logged",)
    proof = {"log_rows_of_this_size": count, "newest": rows}
    at = rows[0]["created_at"]
    return candidate(cause, match.tokens, "possible", at=at, alternatives=others, evidence=proof)


def _of_pair(evidence: Evidence, rest: int) -> list[Candidate]:
    """Return the causes for two log rows that add up to `rest`, if there is only one pair: several match by chance."""
    if sum(pair.count for pair in evidence.pairs) != 1:
        return []
    (pair,) = evidence.pairs
    if rest > 0 and pair.kinds != "LL":
        return []
    found = []
    for row in pair.rows:
        cause: Cause = "missed_decrement"
        if rest < 0:
            cause = "failed_usage_charged" if row["kind"] == "F" else "double_decrement"
        tokens = int(row["tokens"]) if rest > 0 else -int(row["tokens"])
        others = ("lost_update", "manual_edit") if rest > 0 else ("charged_not_logged",)
        at, proof = row["created_at"], {"rows": [row]}
        found.append(candidate(cause, tokens, "possible", at=at, alternatives=others, evidence=proof))
    return found


def _unexplained(drift: Drift, plan_sizes: frozenset[int]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the causes that an unexplained drift may hide, and the figures that were considered."""
    evidence = drift.evidence
    considered = {
        "rows_of_this_size": 0,
        "pairs_of_rows": {pair.kinds: pair.count for pair in evidence.pairs},
        "purchases": len(evidence.purchases) if evidence.purchases_mapped else None,
    }
    more: dict[str, Any] = {"considered": considered}
    if drift.tokens < 0:
        return (), more
    paid = [*(purchase.tokens for purchase in evidence.purchases), *evidence.credit_may_be_late]
    smaller = [size for size in (paid if evidence.purchases_mapped else plan_sizes) if size <= drift.surplus]
    if smaller:
        # A purchase together with another cause may make up the drift.
        more["may_contain_a_plan_of"] = max(smaller)
    # If payments are not mapped, a purchase may have raised the counter and another cause lowered it.
    names = [] if evidence.purchases_mapped else ["credit_without_grant"]
    names += ["carried_over_tokens"] if evidence.used_before and not evidence.purchases_mapped else []
    names += dict.fromkeys(one.component.cause for one in credits_of(evidence))
    names += ["carried_over_tokens"] if evidence.carried else []
    names += ["manual_edit"] if _looks_given(drift, plan_sizes) else []
    return tuple(names), more


def _looks_given(drift: Drift, plan_sizes: frozenset[int]) -> bool:
    """Return whether the drift looks like a gift by hand, and not like several missed decrements.

    A gift is round, has a plan's size, exceeds the usage, or equals the tokens that the last correction subtracted.
    """
    given = drift.surplus  # a part of it may have been used beyond the plan
    base = drift.evidence.base
    given_back = base.written is not None and given == (base.seen_before or 0) - base.written
    return given % weights.ROUND_FIGURE == 0 or given in plan_sizes or given > drift.consumed or given_back
