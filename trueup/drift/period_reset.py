"""The reset of a counter at the beginning of a repeating period: not yet done, or done late. Pure."""

from trueup.drift.causes import Component, Explanation
from trueup.drift.detect import Drift


def explain_reset(drift: Drift, plan_sizes: frozenset[int]) -> Explanation | None:
    """Return the explanation of a drift that is exactly what the host's reset left or put back; None: it is not.

    `plan_sizes`: the tokens that plans include. A surplus of a plan's or a purchase's size has that as an
    alternative, so that no paid tokens are taken.
    """
    reset, rest = drift.evidence.reset, drift.surplus
    if reset is None or drift.observed is None or drift.is_negative:
        return None
    # One row of this size is a missed decrement, unless the host's decrements tell otherwise.
    put_back = reset.used_until if drift.evidence.decrements_mapped else reset.used_until[1:]
    before = max(0, drift.original - reset.used_before)
    # A counter that counts down stops at zero.
    is_old = (
        reset.used_before > 0
        and drift.tokens < 0
        and (rest == -reset.used_before or (not drift.counts_up and drift.observed == max(0, before - drift.consumed)))
    )
    alternatives: tuple[str, ...] = ()
    if is_old:
        note = "the counter still shows the period before"
    elif rest > 0 and rest in put_back:
        note = "the counter was set to its full value after this usage of the period"
        evidence = drift.evidence
        bought = [purchase.tokens for purchase in evidence.purchases if not purchase.granted]
        may_be_paid = rest in plan_sizes or rest in bought or rest in evidence.credit_may_be_late
        alternatives = ("credit_without_grant",) if may_be_paid else ()
    else:
        return None
    part = Component(cause="period_reset", tokens=drift.tokens if is_old else rest, certainty="likely",
                     evidence={"note": note, "used_before": reset.used_before})  # fmt: skip
    return Explanation(components=(part,), alternatives=alternatives, evidence=drift.figures)
