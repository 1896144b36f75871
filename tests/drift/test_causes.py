"""Explanations from given evidence; test_evidence.py tests the evidence from the host's rows."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from tests.support.findings import (
    AT,
    INT4,
    LATER,
    NOW,
    SOON,
    carried,
    concurrent,
    drift,
    edge_row,
    ledger,
    overlaps,
    part,
    purchase,
    rows,
    same_size,
    segment,
)
from trueup.drift.action import decide
from trueup.drift.detect import Drift
from trueup.drift.explain import explain


def named(found: Drift, *plan_sizes: int) -> dict[str, int]:
    """Return the causes with their tokens."""
    explanation = explain(found, plan_sizes=frozenset(plan_sizes), counter_limit=INT4, now=NOW)
    shares: dict[str, int] = {}
    for one in explanation.components:
        shares[one.cause] = shares.get(one.cause, 0) + one.tokens
    return shares


UPGRADE, TRIAL = carried(4_000, 1_600), carried(None, 1_600)
COUNTED, FAILED, BOTH = same_size(-300, counted=2), same_size(-300, failed=1), same_size(-300, counted=1, failed=1)
MISSED = same_size(300, counted=2)
PAYMENTS = {"purchases_mapped": True}
TAKEN_OFF = {"at": AT, "kind": "correction", "written": 9_000}


@pytest.mark.parametrize(
    ("found", "plan_sizes", "cause", "policy"),
    [
        (drift(None, 500), {10_000}, "counter_null", "correct"),
        (drift(-5, 500), {10_000}, "counter_negative", "review"),
        (drift(500, 200, MISSED), {10_000}, "missed_decrement", "correct"),
        (drift(200, 500, COUNTED), {10_000}, "double_decrement", "correct"),
        (drift(200, 500, FAILED), {10_000}, "failed_usage_charged", "correct"),
        (drift(200, 500, BOTH), {10_000}, "failed_usage_charged", "correct"),
        (drift(200, 500), {10_000}, "unexplained", "correct"),
        # Possible paid tokens are never taken away: above the plan, a plan's size, or unexplained.
        (drift(10_001, 10_000), {50_000}, "credit_without_grant", "review"),
        (drift(500, 200), {300, 10_000}, "credit_without_grant", "review"),
        (drift(500, 200, MISSED), {300}, "credit_without_grant", "review"),
        (drift(500, 200, {**MISSED, "used_before": True}), {10_000}, "missed_decrement", "review"),
        (drift(500, 200), {299}, "unexplained", "review"),
        (drift(500, 200), {10_000}, "unexplained", "review"),
        # If tokens are sold only by payments, it may be several missed decrements, unless it looks like a gift.
        (drift(9_337, 9_000, PAYMENTS), {10_000}, "unexplained", "correct"),
        (drift(9_300, 9_000, PAYMENTS), {10_000}, "unexplained", "review"),
        (drift(9_337, 9_000, PAYMENTS), {337}, "unexplained", "review"),
        (drift(9_937, 9_000, PAYMENTS), {10_000}, "unexplained", "correct"),
        (drift(10_937, 9_000, PAYMENTS), {10_000}, "unexplained", "review"),
        (drift(8_700, 9_000, PAYMENTS), {10_000}, "unexplained", "correct"),
        (
            drift(9_337, 9_000, {**PAYMENTS, "base": {**TAKEN_OFF, "seen_before": 9_337}}),
            set(),
            "unexplained",
            "review",
        ),
        (
            drift(9_337, 9_000, {**PAYMENTS, "base": {**TAKEN_OFF, "seen_before": 9_338}}),
            set(),
            "unexplained",
            "correct",
        ),
        # Its tokens used beyond the plan are part of it.
        (drift(175, 0, PAYMENTS, consumed=10_625), {20_000}, "unexplained", "review"),
        (drift(175, 0, PAYMENTS, consumed=10_626), {20_000}, "unexplained", "correct"),
        # It may contain tokens that an upgrade kept, and a request of another size.
        (drift(500, 200, {**MISSED, **PAYMENTS}), {10_000}, "missed_decrement", "correct"),
        (drift(500, 200, {**MISSED, **PAYMENTS, "carried": [UPGRADE]}), {10_000}, "missed_decrement", "review"),
        (drift(500, 200, {**MISSED, **PAYMENTS, "carried": [TRIAL]}), {3_000}, "missed_decrement", "review"),
        # Set to zero at the subscription's end, on purpose.
        (drift(0, 500, is_active=False), {10_000}, "burned_at_expiry", "report"),
        (drift(0, 500, end_date=NOW - timedelta(seconds=1)), {10_000}, "burned_at_expiry", "report"),
        (drift(0, 500, end_date=NOW), {10_000}, "unexplained", "correct"),
        (drift(1, 500, is_active=False), {10_000}, "unexplained", "correct"),
        # A column that can't hold the remaining tokens.
        (drift(INT4, INT4 + 1), {10_000}, "counter_out_of_range", "report"),
        (drift(None, INT4 + 1), {10_000}, "counter_out_of_range", "report"),
        (drift(None, INT4), {10_000}, "counter_null", "correct"),
    ],
)
def test_the_evidence_decides_the_cause_and_the_cause_the_policy(
    found: Drift, plan_sizes: set[int], cause: str, policy: str
) -> None:
    explanation = explain(found, plan_sizes=frozenset(plan_sizes), counter_limit=INT4, now=NOW)
    verdict = decide(found, explanation)
    assert (explanation.cause, verdict.policy) == (cause, policy)
    assert explanation.evidence == {**explanation.evidence, "original": 10_000, "consumed": found.consumed}


def test_the_evidence_names_the_matching_rows() -> None:
    explanation = explain(drift(500, 200, MISSED), plan_sizes=frozenset(), counter_limit=INT4, now=NOW)
    assert explanation.components[0].evidence == {"log_rows_of_this_size": 2, "newest": rows(2)}
    # Without decrement rows these two look the same.
    assert (explanation.alternatives, explanation.certainty) == (("lost_update",), "possible")


def test_a_drift_larger_than_a_plan_names_the_plan_that_it_may_contain() -> None:
    sizes = frozenset({100, 3_000, 9_000})
    explanation = explain(drift(5_000, 1_000), plan_sizes=sizes, counter_limit=INT4, now=NOW)
    assert explanation.evidence["may_contain_a_plan_of"] == 3_000
    assert explanation.evidence["considered"]["purchases"] is None


def test_a_null_counter_drifts_by_all_remaining_tokens() -> None:
    assert (drift(None, 500).tokens, drift(700, 500).tokens, drift(0, 500).tokens) == (-500, 200, -500)


def test_two_rows_explain_a_drift_only_if_no_other_pair_does() -> None:
    pair = [{"kind": "L", "log_id": str(size), "tokens": size, "created_at": AT} for size in (100, 200)]
    once = {"pairs": [{"kinds": "LL", "count": 1, "rows": pair}]}
    assert named(drift(500, 200, once)) == {"missed_decrement": 300}
    assert named(drift(200, 500, once)) == {"double_decrement": -300}
    assert named(drift(500, 200, {"pairs": [{"kinds": "LL", "count": 2, "rows": pair}]})) == {}


@pytest.mark.parametrize("missed", [0, 300])
def test_a_payment_credited_twice_is_named_by_amounts_alone_too(missed: int) -> None:
    bought = {**PAYMENTS, "purchases": [purchase(5_000)], **(MISSED if missed else {})}
    found = drift(19_000, 9_000, bought)
    assert named(found, 5_000) == {"credit_without_grant": 5_000, "credited_twice": 5_000}
    explanation = explain(found, plan_sizes=frozenset({5_000}), counter_limit=INT4, now=NOW)
    assert decide(found, explanation).policy == "review"
    assert "manual_edit" in explanation.alternatives


def test_young_usage_may_be_all_of_a_drift() -> None:
    explanation = explain(
        drift(500, 200, {"young": {"count": 2, "tokens": 300}}), plan_sizes=frozenset(), counter_limit=INT4, now=NOW
    )
    assert (explanation.cause, explanation.in_flight) == ("unexplained", 300)
    more = explain(
        drift(501, 200, {"young": {"count": 2, "tokens": 300}}), plan_sizes=frozenset(), counter_limit=INT4, now=NOW
    )
    assert more.in_flight == 0


# --- With the host's decrement rows: the causes add up ------------------------------------------------------------


@pytest.mark.parametrize(
    ("observed", "expected", "evidence", "shares"),
    [
        (9_300, 9_000, {"parts": [part("missed", 300)]}, {"missed_decrement": 300}),
        (8_700, 9_000, {"parts": [part("double", -300)]}, {"double_decrement": -300}),
        (8_700, 9_000, {"parts": [part("failed", -300)]}, {"failed_usage_charged": -300}),
        (8_700, 9_000, {"parts": [part("unlogged", -300)]}, {"charged_not_logged": -300}),
        # Without a row it is a manual edit.
        (9_500, 9_000, {}, {"manual_edit": 500}),
        (
            9_500,
            9_000,
            {"parts": [part("missed", 300), part("failed", -50)]},
            {"missed_decrement": 300, "failed_usage_charged": -50, "manual_edit": 250},
        ),
        # One of two concurrent decrements is lost; or two such, if their requests overlapped.
        (9_120, 9_000, {"concurrent": [concurrent(120, 80), concurrent(80, 120)]}, {"lost_update": 120}),
        (9_200, 9_000, {"concurrent": [concurrent(120, 80), concurrent(80, 120)]}, {"manual_edit": 200}),
        (9_121, 9_000, {"concurrent": [concurrent(120, 80), concurrent(80, 120)]}, {"manual_edit": 121}),
        # A purchase raised the counter, or it did not: the sum decides.
        (14_000, 9_000, {"purchases": [purchase(5_000)]}, {"credit_without_grant": 5_000}),
        (14_000, 9_000, {"purchases": [purchase(5_000, own_plan=True)]}, {"renewal_without_new_window": 5_000}),
        (
            9_300,
            9_000,
            {"purchases": [purchase(5_000)], "parts": [part("missed", 300)]},
            {"missed_decrement": 300},
        ),
        # Raised a second time for a payment that the figures have, or that raised the counter before.
        (14_000, 9_000, {"purchases": [purchase(5_000, granted=True)]}, {"credited_twice": 5_000}),
        (14_000, 9_000, {"purchases": [purchase(5_000, own_plan=True, opened_window=True)]}, {"credited_twice": 5_000}),
        (
            19_300,
            9_000,
            {"purchases": [purchase(5_000)], "parts": [part("missed", 300)]},
            {"missed_decrement": 300, "credit_without_grant": 5_000, "credited_twice": 5_000},
        ),
        # A grant that no payment has made is a person's work, and so is the same amount again.
        (14_000, 9_000, {"purchases": [purchase(5_000, kind="grant", granted=True)]}, {"manual_edit": 5_000}),
        # Many purchases just before the base point do not hide causes after it.
        (
            8_700,
            9_000,
            {
                "purchases": [purchase(5_000, settled=True) for _ in range(9)],
                "edges": [{"tokens": 300, "rows": [edge_row("L", settled=True), edge_row("D", at=LATER)]}],
            },
            {"double_decrement": -300},
        ),
        # An upgrade kept the tokens left of a running plan.
        (11_400, 9_000, {"carried": [carried(4_000, 1_600)]}, {"carried_over_tokens": 2_400}),
        # So did the host, exactly, of a plan that had ended.
        (11_400, 9_000, {"carried": [carried(4_000, 1_600, ran_out=True)]}, {"carried_over_tokens": 2_400}),
        # The counter stopped at zero, and a purchase came after that.
        (
            4_500,
            0,
            {
                "original": 10_000,
                "consumed": 10_700,
                "purchases": [purchase(5_000)],
                "segments": [segment(0, 9_000, 1_200), segment(1, 500)],
            },
            {"clamped_at_zero": 200, "credit_without_grant": 5_000},
        ),
        # The host would not have passed so many requests at zero: an upgrade kept tokens.
        (
            5_000,
            0,
            {
                "original": 10_000,
                "consumed": 12_100,
                "purchases": [purchase(5_000)],
                "carried": [carried(3_000, 1_000, same_plan=True)],
                "segments": [segment(0, 9_900, *[220] * 10), segment(1)],
            },
            {"carried_over_tokens": 2_000, "clamped_at_zero": 100, "credit_without_grant": 5_000},
        ),
        # The host would not have passed so many requests at zero: a manual edit raised the counter before.
        (
            600,
            0,
            {
                "original": 10_000,
                "consumed": 12_400,
                "segments": [segment(0, 9_900, *[250] * 10)],
            },
            {"manual_edit": 3_000},
        ),
        # Charges of trueup's while the host had the counter locked.
        (
            9_300,
            9_000,
            {"own_missed": {"count": 1, "tokens": 300, "rows": [{"id": "1", "tokens": 300, "at": AT}]}},
            {"missed_decrement": 300},
        ),
        # Grants that the counter does not show, or kept after they ended.
        (
            9_000,
            9_500,
            {
                "purchases": [purchase(500, id="1", kind="grant", granted=True)],
                "grants": [
                    {
                        "id": 1,
                        "tokens": 500,
                        "reference": None,
                        "granted_at": AT,
                        "given_since": True,
                        "ended_since": None,
                    }
                ],
            },
            {"grant_not_in_counter": -500},
        ),
        # Below zero, and further causes in the rows.
        (-40, 9_000, {"parts": [part("missed", 300)]}, {"missed_decrement": 300, "counter_negative": -9_340}),
    ],
)
def test_the_causes_add_up_to_the_drift(
    observed: int, expected: int, evidence: dict[str, Any], shares: dict[str, int]
) -> None:
    figures = {key: evidence.pop(key) for key in ("original", "consumed") if key in evidence}
    found = drift(observed, expected, ledger(**evidence), **figures)
    assert named(found) == shares
    assert sum(shares.values()) == found.surplus


@pytest.mark.parametrize(
    ("evidence", "certainty", "alternatives"),
    [
        ({"parts": [part("missed", 300)]}, "inferred", ()),
        ({"parts": [part("double", 300)]}, "possible", ("charged_not_logged",)),
        ({"parts": [part("unlogged", 300)]}, "inferred", ()),
        ({"parts": [part("unlogged", 300, elsewhere=True)]}, "possible", ("double_decrement",)),
        # A missed decrement as large as a purchase may be that purchase.
        ({"parts": [part("missed", 300)], "purchases": [purchase(300)]}, "possible", ("credit_without_grant",)),
        # Both requests overlapped, so one write may be lost. Closeness alone proves less.
        (overlaps(300), "possible", ()),
        ({"concurrent": [concurrent(300, 80)]}, "possible", ("manual_edit",)),
        (overlaps(120, 180), "possible", ()),
        ({"purchases": [purchase(300)]}, "inferred", ()),
        # The purchase, or a lost decrement of its size.
        (
            {"purchases": [purchase(300)], "concurrent": [concurrent(300, 80)]},
            "possible",
            ("lost_update",),
        ),
        ({}, "possible", ()),
    ],
)
def test_alternatives_are_named_and_lower_the_certainty(
    evidence: dict[str, Any], certainty: str, alternatives: tuple[str, ...]
) -> None:
    found = drift(9_300, 9_000, ledger(**evidence))
    explanation = explain(found, plan_sizes=frozenset(), counter_limit=INT4, now=NOW)
    assert (explanation.certainty, explanation.alternatives) == (certainty, alternatives)


LOST = (1_009, 311, 2_503, 47, 750)


@pytest.mark.parametrize(
    ("sizes", "off_by", "doubtful"),
    [
        # One of them, all of them, all but one: few sums, so a match by chance is improbable.
        (LOST, 311, False),
        (LOST, sum(LOST), False),
        (LOST, sum(LOST) - 750, False),
        # So small that people never give it.
        ((7,), 7, False),
        # Equal losses count as often as they occur.
        ((400, 400, 400), 800, False),
        # Two of twelve; but three of them are one way of 220.
        (range(1_000, 1_120, 10), 2_010, False),
        (range(1_000, 1_120, 10), 3_030, True),
        # So many sums that they prove nothing, except all and single losses; and more than were searched.
        (range(100, 139), 100 + 101 + 102 + 103, True),
        (range(100, 139), sum(range(100, 139)), False),
        (range(100, 160), sum(range(100, 160)), True),
        # A plan's size: a person may have granted one.
        ((10_000,), 10_000, True),
        ((4_000, 6_000), 10_000, True),
    ],
)
def test_lost_updates_are_summed_while_a_match_by_chance_is_improbable(
    sizes: Sequence[int], off_by: int, doubtful: bool
) -> None:
    found = drift(off_by, 0, ledger(**overlaps(*sizes)))
    explanation = explain(found, plan_sizes=frozenset({10_000}), counter_limit=INT4, now=NOW)
    verdict = decide(found, explanation)
    assert (verdict.policy, verdict.write) == (("review", None) if doubtful else ("correct", 0))
    if not doubtful:
        assert (explanation.cause, explanation.tokens_explained(found)) == ("lost_update", off_by)


def test_improbable_candidates_do_not_crowd_out_likelier_ones() -> None:
    """A pair of rows across the base point is tried, however many rows may have come late."""
    straddling = {"tokens": 300, "rows": [edge_row("L", settled=True), edge_row("D", at=LATER)]}
    late = [{"tokens": 1_000 + size, "rows": [edge_row("L", settled=True)]} for size in range(9)]
    found = drift(8_700, 9_000, ledger(edges=[straddling, *late], base={"at": LATER, "kind": "run"}))
    assert named(found) == {"double_decrement": -300}


@pytest.mark.parametrize(
    ("off_by", "base", "edge", "shares", "in_flight"),
    [
        # Its decrement may still arrive, or has arrived without a row yet: the counter decides.
        (300, {}, [edge_row("L", young=True)], {}, 300),
        (500, {}, [edge_row("L", young=True)], {"manual_edit": 200}, 300),
        # The counter was corrected between a log row and its decrement.
        (-300, {"kind": "correction"}, [edge_row("L", settled=True), edge_row("D", at=LATER)],
         {"double_decrement": -300}, 0),
        # The decrement in flight at the correction never came; or the host wrote back the old value.
        (300, {"kind": "correction", "kept": 300}, [edge_row("L", settled=True)], {"missed_decrement": 300}, 0),
        (300, {"kind": "correction", "at": LATER, "kept": 300}, [edge_row("L", settled=True)],
         {"missed_decrement": 300}, 0),
        (300, {"kind": "correction", "at": LATER, "kept": 299}, [edge_row("L", settled=True)], {"manual_edit": 300}, 0),
        (120, {"kind": "correction", "written": 9_000, "seen_before": 9_120}, [], {"lost_update": 120}, 0),
        # Timed just before the comparison and committed just after it; a much older row is not.
        (300, {"kind": "correction", "at": SOON}, [edge_row("L", settled=True)], {"missed_decrement": 300}, 0),
        (-300, {"kind": "run", "at": SOON}, [edge_row("D", settled=True)], {"charged_not_logged": -300}, 0),
        (300, {"kind": "correction", "at": LATER}, [edge_row("L", settled=True)], {"manual_edit": 300}, 0),
        (-300, {"kind": "run", "at": LATER}, [edge_row("D", settled=True)], {"manual_edit": -300}, 0),
        # Settled rows alone prove nothing.
        (500, {"kind": "window"}, [edge_row("L", settled=True)], {"manual_edit": 500}, 0),
    ],
)  # fmt: skip
def test_rows_near_the_base_point_count_if_the_sum_needs_them(
    off_by: int, base: dict[str, Any], edge: list[dict[str, Any]], shares: dict[str, int], in_flight: int
) -> None:
    edges = [{"tokens": 300, "rows": edge}] if edge else []
    found = drift(9_000 + off_by, 9_000, ledger(edges=edges, base={"at": AT, **base}))
    explanation = explain(found, plan_sizes=frozenset(), counter_limit=INT4, now=NOW)
    assert (named(found), explanation.in_flight) == (shares, in_flight)


def test_incomplete_decrement_rows_explain_nothing() -> None:
    evidence = ledger(parts=[part("missed", 5_000)], logged_rows=40, lowered_rows=3)
    assert named(drift(9_100, 9_000, evidence)) == {}


@pytest.mark.parametrize(
    ("more", "plan_sizes", "policy"),
    [
        ({"purchases": [purchase(337)]}, (), "review"),
        ({"purchases": [purchase(300)]}, (), "review"),
        ({"credit_may_be_late": [300]}, (), "review"),
        ({"purchases_mapped": False}, (337,), "review"),
        ({"purchases_mapped": False}, (300,), "review"),
        ({}, (300,), "correct"),
    ],
)
def test_beside_incomplete_decrement_rows_no_machine_takes_what_may_be_paid(
    more: dict[str, Any], plan_sizes: Sequence[int], policy: str
) -> None:
    evidence = ledger(parts=[part("missed", 5_000)], logged_rows=40, lowered_rows=3, **more)
    found = drift(9_337, 9_000, evidence)
    explanation = explain(found, plan_sizes=frozenset(plan_sizes), counter_limit=INT4, now=NOW)
    assert decide(found, explanation).policy == policy


def test_without_payments_a_drift_of_a_plans_size_may_be_a_purchase() -> None:
    evidence = ledger(purchases_mapped=False)
    assert named(drift(9_500, 9_000, evidence), 500) == {"credit_without_grant": 500}
    assert named(drift(9_500, 9_000, evidence), 400) == {"manual_edit": 500}
