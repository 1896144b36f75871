from datetime import timedelta
from typing import Any

import pytest

from billing.causes import explain
from billing.drifts import Drift, SameSizeRows
from billing.policies import decide
from tests.support.host import START

NOW = START + timedelta(days=3)
ROWS = SameSizeRows(matches=2, newest=[{"log_id": "a", "tokens": 300, "created_at": "2026-11-02"}])
INT4 = 2**31 - 1


def drift(observed: int | None, expected: int, **more: Any) -> Drift:
    values = {
        "user_id": 1,
        "subscription_id": "1",
        "is_active": True,
        "end_date": None,
        "original": 10_000,
        "consumed": 10_000 - expected,
        "counted_rows": SameSizeRows(),
        "failed_rows": SameSizeRows(),
        **more,
    }
    return Drift(observed=observed, expected=expected, **values)


@pytest.mark.parametrize(
    ("found", "plan_sizes", "cause", "policy"),
    [
        (drift(None, 500), {10_000}, "counter_null", "correct"),
        (drift(-5, 500), {10_000}, "counter_negative", "correct"),
        (drift(500, 200, counted_rows=ROWS), {10_000}, "missed_decrement", "correct"),
        (drift(500, 200), {10_000}, "unexplained", "correct"),
        (drift(200, 500, counted_rows=ROWS), {10_000}, "double_decrement", "correct"),
        (drift(200, 500, failed_rows=ROWS), {10_000}, "failed_usage_charged", "correct"),
        (drift(200, 500, failed_rows=ROWS, counted_rows=ROWS), {10_000}, "failed_usage_charged", "correct"),
        (drift(200, 500), {10_000}, "unexplained", "correct"),
        # What may be paid tokens is never taken: above the plan, as large as a plan, or larger than one.
        (drift(10_001, 10_000), {50_000}, "credit_without_grant", "review"),
        (drift(10_001, 10_000, counted_rows=ROWS), {50_000}, "credit_without_grant", "review"),
        (drift(500, 200), {300, 10_000}, "credit_without_grant", "review"),
        (drift(500, 200, counted_rows=ROWS), {300}, "credit_without_grant", "review"),
        (drift(500, 200), {299}, "unexplained", "review"),
        (drift(500, 200, counted_rows=ROWS), {299}, "missed_decrement", "correct"),
        # Zeroed at its end, on purpose.
        (drift(0, 500, is_active=False), {10_000}, "burned_at_expiry", "report"),
        (drift(0, 500, end_date=NOW - timedelta(seconds=1)), {10_000}, "burned_at_expiry", "report"),
        (drift(0, 500, end_date=NOW), {10_000}, "unexplained", "correct"),
        (drift(1, 500, is_active=False), {10_000}, "unexplained", "correct"),
        # A column that can't hold what remains.
        (drift(INT4, INT4 + 1), {10_000}, "counter_out_of_range", "report"),
        (drift(None, INT4 + 1), {10_000}, "counter_out_of_range", "report"),
        (drift(None, INT4), {10_000}, "counter_null", "correct"),
    ],
)
def test_the_evidence_decides_the_cause_and_the_cause_what_may_be_done(
    found: Drift, plan_sizes: set[int], cause: str, policy: str
) -> None:
    explanation = explain(found, plan_sizes=frozenset(plan_sizes), counter_limit=INT4, now=NOW)
    verdict = decide(found, explanation)
    assert (explanation.cause, verdict.policy) == (cause, policy)
    assert verdict.write == (found.expected if policy == "correct" else None)
    assert explanation.evidence == {**explanation.evidence, "original": 10_000, "consumed": found.consumed}


def test_the_rows_that_fit_are_named_in_the_evidence() -> None:
    explanation = explain(drift(500, 200, counted_rows=ROWS), plan_sizes=frozenset(), counter_limit=INT4, now=NOW)
    assert explanation.components[0].evidence == {"log_rows_of_this_size": 2, "newest": ROWS.newest}


def test_a_drift_larger_than_a_plan_says_which_plan_it_may_contain() -> None:
    sizes = frozenset({100, 3_000, 9_000})
    explanation = explain(drift(5_000, 1_000), plan_sizes=sizes, counter_limit=INT4, now=NOW)
    assert explanation.evidence["may_contain_a_plan_of"] == 3_000


def test_a_null_counter_drifts_by_what_it_does_not_show() -> None:
    assert (drift(None, 500).tokens, drift(700, 500).tokens, drift(0, 500).tokens) == (-500, 200, -500)
