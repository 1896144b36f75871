"""What may be done about a drift: correct it, hold it for a person, or only report it. Pure: rules in, verdict out."""

from dataclasses import dataclass

from trueup.drift.causes import Explanation
from trueup.drift.detect import Drift
from trueup.settings.policies import PAID_CAUSES, POLICIES, UNCORRECTABLE_CAUSES, Policy, Rules


@dataclass(frozen=True, kw_only=True)
class History:
    """What is known from before of a user's counter, in this window.

    `unchanged`: the same figures have been seen for longer than the rules' minimum age. `held`: tokens too many were
    held for review, and nobody has decided yet. `ignored`: the differences in tokens that a person said to leave alone.
    `undone`: a person put the counter back, and none has decided since.
    """

    unchanged: bool = False
    held: bool = False
    ignored: frozenset[int] = frozenset()
    undone: bool = False


HELD = "may contain tokens that were held for review, and nobody has decided about them"
NO_HISTORY = History()
DEFAULT_RULES = Rules()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`write`: the value to set the counter to, only with "correct". `reason`: the rule that decided, for people.

    `action`: what a drift row says of a drift that nothing is written for.
    """

    policy: Policy
    reason: str
    write: int | None = None
    action: str = "reported"


def difference(drift: Drift, in_flight: int) -> int:
    """Return by how much the counter would be off once the decrements in flight are made; a null counter is read as 0.

    `in_flight`: tokens of usage whose decrements may still come. They are missing in a counter that stops at zero only
    as far as it had them.
    """
    return (drift.observed or 0) - max(0, drift.original - drift.consumed + in_flight)


def decide(
    drift: Drift,
    explanation: Explanation,
    *,
    rules: Rules = DEFAULT_RULES,
    history: History = NO_HISTORY,
    counter_limit: int | None = None,
) -> Verdict:
    """Say what may be done about a drift. What may be paid tokens is never "correct".

    `counter_limit`: the largest value that the counter's column takes; None: not known.
    """
    in_flight = 0 if history.unchanged else explanation.in_flight
    off_by = difference(drift, in_flight)
    if drift.observed is not None and abs(off_by) <= rules.tolerance:
        return _tolerated(in_flight, rules)
    if off_by in history.ignored:
        return Verdict(policy="report", action="ignored", reason="a person said to ignore this difference")
    if history.undone:
        return _review("a correction was undone in this window: a person decides")
    policy = max((rules.policy_of(cause) for cause in _causes(drift, explanation)), key=POLICIES.index)
    if policy == "report":
        return Verdict(policy="report", reason=f"policy of {explanation.cause}")
    doubt = None if policy == "review" else _doubt(off_by, explanation, rules, history)
    if policy == "review" or doubt is not None:
        return _review(doubt or f"policy of {explanation.cause}")
    write = (drift.observed or 0) - off_by
    if counter_limit is not None and write > counter_limit:
        return Verdict(policy="report", reason="the counter's column can't hold what is right")
    kept = f", {in_flight} tokens in flight kept" if in_flight else ""
    return Verdict(policy="correct", write=write, reason=f"policy of {explanation.cause}{kept}")


def _tolerated(in_flight: int, rules: Rules) -> Verdict:
    if in_flight:
        return Verdict(
            policy="report", action="waiting", reason=f"usage younger than {rules.min_age_seconds} s may still arrive"
        )
    return Verdict(policy="report", action="tolerated", reason=f"within the tolerance of {rules.tolerance} tokens")


def _review(reason: str) -> Verdict:
    return Verdict(policy="review", action="review", reason=reason)


def _causes(drift: Drift, explanation: Explanation) -> set[str]:
    """Return the causes that have a say; what the components leave over is unexplained."""
    named = sum(component.tokens for component in explanation.components)
    whole = {drift.tokens, (drift.observed or 0) - (drift.original - drift.consumed)}
    causes: set[str] = {component.cause for component in explanation.components}
    if not causes or not {named, named + explanation.in_flight} & whole:
        causes.add("unexplained")
    return causes


def _doubt(off_by: int, explanation: Explanation, rules: Rules, history: History) -> str | None:
    """Return why a counter that the policies would correct is held for a person after all; None: it is not."""
    others = set(explanation.alternatives)
    if off_by > 0 and others & PAID_CAUSES:
        return f"may be paid tokens: {', '.join(sorted(others & PAID_CAUSES))} fits as well"
    if off_by > 0 and "may_contain_a_plan_of" in explanation.evidence:
        return "may be paid tokens: a plan's size fits into it"
    if history.held:
        # By chance one cause may fit the sum of what is held and something new.
        return HELD
    if off_by < 0 and others & UNCORRECTABLE_CAUSES:
        return f"{', '.join(sorted(others & UNCORRECTABLE_CAUSES))} fits as well"
    if rules.max_correction is not None and abs(off_by) > rules.max_correction:
        return f"more than {rules.max_correction} tokens"
    return None
