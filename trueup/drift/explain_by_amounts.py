"""Why a counter drifted, where the host keeps no rows of its decrements: by sizes alone, so never certain. Pure.

A row of the log, a purchase or two rows that are just as large as the drift explain it. Without decrement rows a missed
decrement looks like a lost update, and a double one like usage that was not logged: the others are named as well.
"""

from dataclasses import replace
from itertools import product
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Component, Explanation
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence, Match
from trueup.drift.hypotheses import Candidate, candidate, carried_of, credits_of, grants_of, own_missed

PAID = ("credit_without_grant", "renewal_without_new_window", "carried_over_tokens")


def explain_by_amounts(drift: Drift, plan_sizes: frozenset[int]) -> Explanation:
    """Name what made a drift, from the sizes of rows."""
    evidence = drift.evidence
    if (drift.observed or 0) < 0:
        part = Component(cause="counter_negative", tokens=drift.tokens, certainty="certain")
        return Explanation(components=(part,), evidence=drift.figures)
    if evidence.young and 0 < drift.tokens <= evidence.young.tokens:
        return Explanation(in_flight=drift.tokens, evidence=drift.figures)
    chosen, alternatives = _chosen(drift, plan_sizes)
    if not chosen:
        others, more = _unexplained(drift, plan_sizes)
        return Explanation(alternatives=others, evidence={**drift.figures, **more})
    ordered = sorted(chosen, key=lambda one: one.at)
    named = [name for one in ordered for name in one.alternatives]
    causes = {one.component.cause for one in ordered}
    return Explanation(
        components=tuple(one.component for one in ordered),
        alternatives=tuple(name for name in dict.fromkeys([*named, *alternatives]) if name not in causes),
        evidence=drift.figures,
    )


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
        return [*own, candidate("credit_without_grant", rest, "likely", evidence=proof)], (*names, "manual_edit")
    if rest in matches:
        return [*own, _of_match(matches[rest])], _hidden_purchase(drift, rest, plan_sizes)
    pair = _of_pair(evidence, rest)
    return [*own, *pair] if pair else [], ()


def _hidden_purchase(drift: Drift, rest: int, plan_sizes: frozenset[int]) -> tuple[str, ...]:
    """What no row tells of may be as large as a row: a purchase and something that lowered it, or tokens kept."""
    evidence = drift.evidence
    unseen = evidence.credit_may_be_late if evidence.purchases_mapped else plan_sizes
    names = ["credit_without_grant"] if any(size <= rest for size in unseen) else []
    names += ["carried_over_tokens"] if rest > 0 and evidence.used_before and not evidence.purchases_mapped else []
    return tuple(names)


def _with_purchases(
    drift: Drift, plan_sizes: frozenset[int], rest: int, matches: dict[int, Match]
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Return the purchases, grants and kept tokens that make it up, maybe with one row of the log; and what else."""
    evidence = drift.evidence
    possible = [*credits_of(evidence), *grants_of(evidence)][-weights.MAX_CREDITS :]
    kept = carried_of(evidence, plan_sizes)
    not_carried = max((one.cost_unused for one in kept), default=0.0)
    found: list[tuple[float, list[Candidate]]] = []
    for flags in product((True, False), repeat=len(possible)):
        used = [one for one, flag in zip(possible, flags, strict=True) if flag]
        cost = sum(one.cost_used if flag else one.cost_unused for one, flag in zip(possible, flags, strict=True))
        for carried in (None, *kept):
            taken = [*used, *([carried] if carried else [])]
            left = rest - sum(one.tokens for one in taken)
            total = cost + (carried.cost_used if carried else not_carried)
            if left == 0:
                found.append((total, taken))
            elif left in matches:
                found.append((total + weights.AMOUNT_OF_A_ROW, [*taken, _of_match(matches[left])]))
    if not found:
        return [], ()
    best = min(found, key=lambda one: one[0])[1]
    others = {one.component.cause for _, taken in found for one in taken}
    # What has no part in it may have one all the same, with something that no row shows: a purchase, or what was kept.
    others |= {one.component.cause for one in possible if one.cost_unused} | {one.component.cause for one in kept}
    return [_likely(one) for one in best], tuple(sorted(others - {one.component.cause for one in best}))


def _likely(one: Candidate) -> Candidate:
    """A size is no proof, for a decrement's row might have told otherwise."""
    if one.component.certainty != "certain":
        return one
    return replace(one, component=replace(one.component, certainty="likely"))


def _of_match(match: Match) -> Candidate:
    """Rows that are as large: more than one, and any of them may be the one."""
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
    return candidate(cause, match.tokens, "likely", at=at, alternatives=others, evidence=proof)


def _of_pair(evidence: Evidence, rest: int) -> list[Candidate]:
    """Two rows that add up to it, if there is but one such pair: among many rows some always do by chance."""
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
        found.append(
            candidate(cause, tokens, "possible", at=row["created_at"], alternatives=others, evidence={"rows": [row]})
        )
    return found


def _unexplained(drift: Drift, plan_sizes: frozenset[int]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Say what was considered, and whether what nothing explains may hide tokens that somebody paid for."""
    evidence = drift.evidence
    more: dict[str, Any] = {
        "considered": {
            "rows_of_this_size": 0,
            "pairs_of_rows": {pair.kinds: pair.count for pair in evidence.pairs},
            "purchases": len(evidence.purchases) if evidence.purchases_mapped else None,
        }
    }
    if drift.tokens < 0:
        return (), more
    sizes = (
        [*(purchase.tokens for purchase in evidence.purchases), *evidence.credit_may_be_late]
        if evidence.purchases_mapped
        else plan_sizes
    )
    smaller = [size for size in sizes if size <= drift.surplus]
    if smaller:
        # A credit and something else may hide in one difference.
        more["may_contain_a_plan_of"] = max(smaller)
    # Payments that are not mapped may have raised it, and something else lowered it again.
    names = [] if evidence.purchases_mapped else ["credit_without_grant"]
    names += ["carried_over_tokens"] if evidence.used_before and not evidence.purchases_mapped else []
    names += dict.fromkeys(one.component.cause for one in credits_of(evidence))
    names += ["carried_over_tokens"] if evidence.carried else []
    names += ["manual_edit"] if _looks_given(drift, plan_sizes) else []
    return tuple(names), more


def _looks_given(drift: Drift, plan_sizes: frozenset[int]) -> bool:
    """Whether it looks like a gift, not like several missed decrements.

    It does if it is round, a plan's size, more than was used, or just what our last correction took off.
    """
    given = drift.surplus  # of which some may have been used beyond the plan
    base = drift.evidence.base
    given_back = base.written is not None and given == (base.seen_before or 0) - base.written
    return given % weights.ROUND_FIGURE == 0 or given in plan_sizes or given > drift.consumed or given_back
