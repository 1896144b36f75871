"""Why a counter drifted, as far as the evidence goes, and what may be done about it. Pure: drift in, verdict out."""

from dataclasses import dataclass
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
Policy = Literal["correct", "review", "report"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The cause of a drift, whether to correct it, and the evidence for both (JSON-safe).

    Policies: "correct" the counter; hold it for "review" by a person; only "report" it.
    """

    cause: Cause
    policy: Policy
    evidence: dict[str, Any]


def judge(drift: Drift, *, plan_sizes: frozenset[int], counter_limit: int, now: datetime) -> Verdict:
    """Name the cause of a drift.

    `plan_sizes`: the token amounts that plans sell. `counter_limit`: the largest value that the counter's column takes.
    What may be paid tokens is never "correct": a counter above its plan, or too high by what a plan sells.
    """
    figures = {"original": drift.original, "consumed": drift.consumed}
    if drift.expected > counter_limit:
        return Verdict(
            cause="counter_out_of_range",
            policy="report",
            evidence={**figures, "counter_limit": counter_limit},
        )
    if drift.observed is None:
        return Verdict(cause="counter_null", policy="correct", evidence=figures)
    if drift.observed < 0:
        return Verdict(cause="counter_negative", policy="correct", evidence=figures)
    if drift.tokens > 0:
        return _judge_overstated(drift, plan_sizes, figures)
    return _judge_understated(drift, now, figures)


def _judge_overstated(drift: Drift, plan_sizes: frozenset[int], figures: dict[str, int]) -> Verdict:
    """The counter shows tokens that the log says are gone."""
    if (drift.observed or 0) > drift.original or drift.tokens in plan_sizes:
        evidence = {**figures, "plans_of_this_size": drift.tokens in plan_sizes}
        return Verdict(cause="credit_without_grant", policy="review", evidence=evidence)
    if drift.counted_rows.matches:
        return Verdict(
            cause="missed_decrement",
            policy="correct",
            evidence={**figures, **_rows(drift.counted_rows)},
        )
    if any(size < drift.tokens for size in plan_sizes):
        # A credit and a decrement may hide in one difference: a person decides.
        evidence = {
            **figures,
            "may_contain_a_plan_of": max(s for s in plan_sizes if s < drift.tokens),
        }
        return Verdict(cause="unexplained", policy="review", evidence=evidence)
    return Verdict(cause="unexplained", policy="correct", evidence=figures)


def _judge_understated(drift: Drift, now: datetime, figures: dict[str, int]) -> Verdict:
    """The counter hides tokens that are left."""
    ended = drift.end_date is not None and drift.end_date < now
    if drift.observed == 0 and (ended or not drift.is_active):
        return Verdict(cause="burned_at_expiry", policy="report", evidence=figures)
    if drift.failed_rows.matches:
        return Verdict(
            cause="failed_usage_charged",
            policy="correct",
            evidence={**figures, **_rows(drift.failed_rows)},
        )
    if drift.counted_rows.matches:
        return Verdict(
            cause="double_decrement",
            policy="correct",
            evidence={**figures, **_rows(drift.counted_rows)},
        )
    return Verdict(cause="unexplained", policy="correct", evidence=figures)


def _rows(rows: SameSizeRows) -> dict[str, Any]:
    """The rows that fit. More than one match: any of them may be the one."""
    return {"log_rows_of_this_size": rows.matches, "newest": rows.newest}
