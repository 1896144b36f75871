"""Decide about a drift: correct it, leave it for a person to review, or only report it. Pure: rules in, verdict out."""

from dataclasses import dataclass

from trueup.drift.causes import Component, Explanation
from trueup.drift.detect import Drift
from trueup.settings.policies import PAID_CAUSES, POLICIES, UNCORRECTABLE_CAUSES, Policy, Rules


@dataclass(frozen=True, kw_only=True)
class History:
    """Earlier findings and decisions about a user's counter in this period.

    `unchanged`: the figures have been the same for longer than the rules' minimum age. `held`: a surplus of tokens
    awaits review, or may be paid and was only reported. `ignored`: the differences in tokens that a person decided to
    ignore. `undone`: a person undid a correction, and no later decision was made.
    """

    unchanged: bool = False
    held: bool = False
    ignored: frozenset[int] = frozenset()
    undone: bool = False


HELD = "may contain tokens that a person has not decided about"
NO_HISTORY = History()
DEFAULT_RULES = Rules()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do about a drift.

    `write`: the counter's new value in tokens; None unless the policy is "correct". `reason`: the rule that decided,
    for people. `action`: recorded in the drift row if the counter is not written. `held`: the components that a
    correction leaves in the counter; they wait for a person, or are only reported.
    """

    policy: Policy
    reason: str
    write: int | None = None
    action: str = "reported"
    held: tuple[Component, ...] = ()


def difference(drift: Drift, in_flight: int) -> int:
    """Return the drift in tokens that remains after the decrements in flight; a null counter reads as 0.

    `in_flight`: tokens of usage whose decrements may still arrive. They can't lower the counter below zero.
    """
    lowest = min(0, drift.expected)  # below 0 only if the counter shows used tokens
    return (drift.observed or 0) - max(lowest, drift.original - drift.consumed + in_flight)


def decide(
    drift: Drift,
    explanation: Explanation,
    *,
    rules: Rules = DEFAULT_RULES,
    history: History = NO_HISTORY,
    counter_limit: int | None = None,
) -> Verdict:
    """Return the verdict on a drift. A surplus that may be paid tokens is never "correct".

    `counter_limit`: the largest value that the counter's column holds, in tokens; None: not known.
    """
    in_flight = 0 if history.unchanged else explanation.in_flight
    off_by = difference(drift, in_flight)
    if drift.observed is not None and abs(off_by) <= rules.tolerance:
        return _tolerated(in_flight, rules)
    if off_by in history.ignored:
        return Verdict(policy="report", action="ignored", reason="a person decided to ignore this difference")
    if history.undone:
        return _review("a person undid a correction in this period")
    if explanation.by_component:
        return _by_component(drift, explanation, in_flight, rules, counter_limit)
    policy = max((rules.policy_of(cause) for cause in _causes(drift, explanation)), key=POLICIES.index)
    if policy == "report":
        return Verdict(policy="report", reason=f"policy of {explanation.cause}")
    doubt = None if policy == "review" else _doubt(off_by, explanation, rules, history)
    if policy == "review" or doubt is not None:
        return _review(doubt or f"policy of {explanation.cause}")
    write = (drift.observed or 0) - off_by
    if counter_limit is not None and drift.written(write) > counter_limit:
        return Verdict(policy="report", reason="the counter's column can't hold the right value")
    kept = f", {in_flight} tokens in flight kept" if in_flight else ""
    return Verdict(policy="correct", write=write, reason=f"policy of {explanation.cause}{kept}")


def _by_component(
    drift: Drift, explanation: Explanation, in_flight: int, rules: Rules, counter_limit: int | None
) -> Verdict:
    """Return the verdict on a drift whose components the journal accounts for: each is decided by itself."""
    reasons = {place: _doubt_about(part, rules) for place, part in enumerate(explanation.components)}
    held = tuple(part for place, part in enumerate(explanation.components) if reasons[place] is not None)
    held_back = sum(part.tokens for part in held)
    write = max(min(0, drift.expected), drift.original - drift.consumed + in_flight + held_back)
    reason = next((reason for reason in reasons.values() if reason), "")
    changed = write != drift.observed and len(held) < len(explanation.components)
    if changed and rules.max_correction is not None and abs(write - (drift.observed or 0)) > rules.max_correction:
        return _review(f"more than {rules.max_correction} tokens")
    if not changed and held:
        if all(part.is_ignored for part in held):
            return Verdict(policy="report", action="ignored", reason=reason)
        in_review = any(not part.is_ignored and rules.policy_of(part.cause) != "report" for part in held)
        return _review(reason) if in_review else Verdict(policy="report", reason=reason)
    if counter_limit is not None and drift.written(write) > counter_limit:
        return Verdict(policy="report", reason="the counter's column can't hold the right value")
    kept = f", {in_flight} tokens in flight kept" if in_flight else ""
    kept += f", {held_back} tokens left for a decision" if held else ""
    causes = "+".join(dict.fromkeys(part.cause for part in explanation.components if part not in held))
    return Verdict(policy="correct", write=write, reason=f"policy of {causes or explanation.cause}{kept}", held=held)


def _doubt_about(part: Component, rules: Rules) -> str | None:
    """Return why a machine does not correct this component; None: it does."""
    if part.is_ignored:
        return "a person decided to ignore this difference"
    policy = rules.policy_of(part.cause)
    if policy != "correct":
        return f"policy of {part.cause}"
    paid = sorted(set(part.alternatives) & PAID_CAUSES)
    if part.tokens > 0 and paid:
        return f"may be paid tokens: {', '.join(paid)} fits as well"
    if part.tokens > 0 and part.is_held:
        return HELD
    if part.tokens < 0 and (others := sorted(set(part.alternatives) & UNCORRECTABLE_CAUSES)):
        return f"{', '.join(others)} fits as well"
    return None


def _tolerated(in_flight: int, rules: Rules) -> Verdict:
    if in_flight:
        return Verdict(
            policy="report", action="waiting", reason=f"usage younger than {rules.min_age_seconds} s may still arrive"
        )
    return Verdict(policy="report", action="tolerated", reason=f"within the tolerance of {rules.tolerance} tokens")


def _review(reason: str) -> Verdict:
    return Verdict(policy="review", action="review", reason=reason)


def _causes(drift: Drift, explanation: Explanation) -> set[str]:
    """Return the causes whose policies apply; "unexplained" is one if the components do not add up to the drift."""
    named = sum(component.tokens for component in explanation.components)
    causes: set[str] = {component.cause for component in explanation.components}
    if not causes or not {named, named + explanation.in_flight} & {drift.tokens, drift.surplus}:
        causes.add("unexplained")
    return causes


def _doubt(off_by: int, explanation: Explanation, rules: Rules, history: History) -> str | None:
    """Return why a drift needs review although the policies would correct it; None: it does not."""
    others = set(explanation.alternatives)
    if off_by > 0 and others & PAID_CAUSES:
        return f"may be paid tokens: {', '.join(sorted(others & PAID_CAUSES))} fits as well"
    if off_by > 0 and "may_contain_a_plan_of" in explanation.evidence:
        return "may be paid tokens: a plan's size fits into it"
    if history.held:
        # One cause may fit the sum of the held tokens and a new drift by chance.
        return HELD
    if off_by < 0 and others & UNCORRECTABLE_CAUSES:
        return f"{', '.join(sorted(others & UNCORRECTABLE_CAUSES))} fits as well"
    if rules.max_correction is not None and abs(off_by) > rules.max_correction:
        return f"more than {rules.max_correction} tokens"
    return None
