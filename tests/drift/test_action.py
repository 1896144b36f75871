from typing import Any, get_args

import pytest

from tests.support.host import START
from trueup.drift.action import History, Verdict, decide
from trueup.drift.causes import Cause, Component, Explanation
from trueup.drift.detect import Drift
from trueup.drift.known_drifts import Past
from trueup.errors import InvalidInputError
from trueup.settings.policies import DEFAULT_POLICIES, PAID_CAUSES, UNCORRECTABLE_CAUSES, Rules

PLAN = 10_000


def drift(observed: int | None, remaining: int) -> Drift:
    """Return the drift of a counter; `remaining` is negative if the user has used more than the plan."""
    return Drift(
        user_id=1,
        subscription_id="1",
        is_active=True,
        end_date=None,
        original=PLAN,
        consumed=PLAN - remaining,
        observed=observed,
        expected=max(0, remaining),
        seen_at=START,
    )


def explained(*parts: tuple[Any, int], **more: Any) -> Explanation:
    components = tuple(Component(cause=cause, tokens=tokens, certainty="possible") for cause, tokens in parts)
    return Explanation(components=components, **more)


def verdict(found: Drift, why: Explanation, **more: Any) -> Verdict:
    rules = {name: more.pop(name) for name in list(more) if name in Rules.__dataclass_fields__}
    return decide(found, why, rules=Rules(**rules), **more)


def test_every_cause_has_a_policy() -> None:
    assert set(DEFAULT_POLICIES) == set(get_args(Cause))
    assert Rules().policy_of("something new") == "review"


@pytest.mark.parametrize(
    ("cause", "observed", "policy"),
    [
        ("missed_decrement", 9_300, "correct"),
        ("lost_update", 9_300, "correct"),
        ("double_decrement", 8_700, "correct"),
        ("failed_usage_charged", 8_700, "correct"),
        ("clamped_at_zero", 9_300, "correct"),
        ("grant_not_in_counter", 8_700, "correct"),
        # The log may be wrong, not the counter.
        ("charged_not_logged", 8_700, "review"),
        ("credit_without_grant", 9_300, "review"),
        ("renewal_without_new_window", 9_300, "review"),
        ("carried_over_tokens", 9_300, "review"),
        ("manual_edit", 9_300, "review"),
        ("manual_edit", 8_700, "review"),
        ("burned_at_expiry", 0, "report"),
        ("counter_out_of_range", 9_300, "report"),
    ],
)
def test_each_cause_has_its_default_policy(cause: str, observed: int, policy: str) -> None:
    given = verdict(drift(observed, 9_000), explained((cause, observed - 9_000)))
    assert (given.policy, given.write) == (policy, 9_000 if policy == "correct" else None)
    assert cause in given.reason


@pytest.mark.parametrize("cause", sorted(PAID_CAUSES | UNCORRECTABLE_CAUSES))
def test_no_policy_can_correct_a_cause_that_needs_a_person(cause: str) -> None:
    with pytest.raises(InvalidInputError, match=f"policies.{cause}"):
        Rules(policies={cause: "correct"})
    for policy in ("review", "report"):
        Rules(policies={cause: policy})


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"policies": {"missed_decrment": "report"}}, "did you mean missed_decrement"),
        ({"policies": {"missed_decrement": "fix"}}, "correct, review, report"),
        ({"policies": {"credit_without_grant": "correct"}}, "trueup drift accept"),
        ({"max_correction": -1}, "max_correction"),
        ({"tolerance": -1}, "tolerance"),
        ({"min_age_seconds": -1}, "min_age_seconds"),
    ],
)
def test_invalid_rules_are_refused_by_name(more: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        Rules(**more)


def test_policies_may_be_stricter_or_looser_than_the_default() -> None:
    missed = explained(("missed_decrement", 300))
    assert verdict(drift(9_300, 9_000), missed, policies={"missed_decrement": "report"}).policy == "report"
    unlogged = explained(("charged_not_logged", -300))
    assert verdict(drift(8_700, 9_000), unlogged, policies={"charged_not_logged": "correct"}).write == 9_000


def test_the_most_careful_policy_of_a_combination_applies() -> None:
    both = explained(("missed_decrement", 300), ("credit_without_grant", 500))
    assert verdict(drift(9_800, 9_000), both).policy == "review"
    policies = {"missed_decrement": "report"}
    assert verdict(drift(9_800, 9_000), both, policies=policies).policy == "report"
    two = explained(("missed_decrement", 300), ("double_decrement", -100))
    assert verdict(drift(9_200, 9_000), two).write == 9_000


def test_a_remainder_of_the_components_is_unexplained() -> None:
    part = explained(("missed_decrement", 300))
    assert verdict(drift(9_301, 9_000), part, policies={"unexplained": "review"}).policy == "review"
    assert verdict(drift(9_300, 9_000), part, policies={"unexplained": "review"}).policy == "correct"
    # For a user over the plan the components explain the whole surplus.
    overdrawn = explained(("clamped_at_zero", 200), ("missed_decrement", 300))
    assert verdict(drift(300, -200), overdrawn, policies={"unexplained": "review"}).write == 0


@pytest.mark.parametrize("cause", sorted(PAID_CAUSES))
def test_a_counter_is_not_lowered_if_paid_tokens_fit_too(cause: str) -> None:
    doubtful = explained(("missed_decrement", 300), alternatives=("lost_update", cause))
    given = verdict(drift(9_300, 9_000), doubtful)
    assert (given.policy, given.write) == ("review", None)
    assert cause in given.reason
    raised = explained(("double_decrement", -300), alternatives=(cause,))
    assert verdict(drift(8_700, 9_000), raised).write == 9_000


def test_a_counter_is_not_raised_if_it_may_have_been_burned() -> None:
    doubtful = explained(("double_decrement", -300), alternatives=("burned_at_expiry",))
    assert verdict(drift(8_700, 9_000), doubtful).policy == "review"


def test_an_unexplained_drift_that_may_contain_a_plan_awaits_review() -> None:
    assert verdict(drift(9_700, 9_000), Explanation(evidence={"may_contain_a_plan_of": 500})).policy == "review"
    assert verdict(drift(9_300, 9_000), Explanation()).write == 9_000
    assert verdict(drift(8_000, 9_000), Explanation()).write == 9_000


@pytest.mark.parametrize(("limit", "policy"), [(None, "correct"), (300, "correct"), (299, "review"), (0, "review")])
@pytest.mark.parametrize("observed", [9_300, 8_700])
def test_a_large_correction_awaits_review(limit: int | None, policy: str, observed: int) -> None:
    assert verdict(drift(observed, 9_000), Explanation(), max_correction=limit).policy == policy


@pytest.mark.parametrize(("tolerance", "action"), [(299, "reported"), (300, "tolerated")])
@pytest.mark.parametrize("observed", [9_300, 8_700])
def test_a_small_drift_is_left_alone(tolerance: int, action: str, observed: int) -> None:
    given = verdict(drift(observed, 9_000), Explanation(), tolerance=tolerance)
    assert (given.action, given.write is None) == (action, action == "tolerated")


def test_a_null_counter_is_not_tolerated() -> None:
    null = explained(("counter_null", 0))
    assert verdict(drift(None, 0), null).write == 0
    assert verdict(drift(None, 5), null, tolerance=10).write == 5


def test_a_drift_of_tokens_in_flight_waits() -> None:
    given = verdict(drift(9_300, 9_000), Explanation(in_flight=300), min_age_seconds=60)
    assert (given.action, given.write) == ("waiting", None)
    assert "60 s" in given.reason
    assert verdict(drift(9_305, 9_000), Explanation(in_flight=300), tolerance=5).action == "waiting"


def test_the_drift_beyond_the_tokens_in_flight_is_corrected() -> None:
    given = verdict(drift(9_800, 9_000), explained(("missed_decrement", 500), in_flight=300))
    assert given.write == 9_300
    assert "300 tokens in flight" in given.reason
    held = verdict(drift(9_800, 9_000), explained(("missed_decrement", 500), in_flight=300), max_correction=499)
    assert held.policy == "review"


def test_over_the_plan_only_tokens_of_the_counter_are_in_flight() -> None:
    """The expected decrement stops at zero."""
    assert verdict(drift(100, -200), Explanation(in_flight=300)).action == "waiting"
    assert verdict(drift(300, -200), explained(("missed_decrement", 200), in_flight=300)).write == 100


def test_unchanged_figures_are_no_longer_in_flight() -> None:
    given = verdict(drift(9_300, 9_000), Explanation(in_flight=300), history=History(unchanged=True))
    assert given.write == 9_000


def test_a_value_too_large_for_the_column_is_not_written() -> None:
    given = verdict(drift(9_800, 9_000), explained(("missed_decrement", 500), in_flight=300), counter_limit=9_299)
    assert (given.policy, given.write) == ("report", None)


def test_an_ignored_difference_is_left_alone_and_another_is_not() -> None:
    history = History(ignored=frozenset({300}))
    why = explained(("credit_without_grant", 300))
    assert verdict(drift(9_300, 9_000), why, history=history).action == "ignored"
    assert verdict(drift(8_300, 8_000), why, history=history).action == "ignored"
    assert verdict(drift(9_301, 9_000), why, history=history).action == "review"
    # Tokens in flight do not belong to it.
    both = explained(("credit_without_grant", 300), in_flight=50)
    assert verdict(drift(9_350, 9_000), both, history=history).action == "ignored"


def test_a_counter_with_an_undone_correction_is_not_corrected_again() -> None:
    given = verdict(drift(9_300, 9_000), explained(("missed_decrement", 300)), history=History(undone=True))
    assert (given.policy, given.write) == ("review", None)
    assert "undid" in given.reason


@pytest.mark.parametrize(
    ("action", "cause", "off_by", "decision", "held"),
    [
        ("review", "unexplained", 500, None, True),
        ("review", "unexplained", 500, "ignore", False),
        ("review", "unexplained", -500, None, False),
        # The policy "report" leaves paid tokens in the counter, too.
        ("reported", "manual_edit", 500, None, True),
        ("reported", "missed_decrement+credit_without_grant", 500, None, True),
        ("reported", "manual_edit", 500, "accept", False),
        ("reported", "manual_edit", -500, None, False),
        ("reported", "missed_decrement", 500, None, False),
        ("corrected", "manual_edit", 500, None, False),
    ],
)
def test_tokens_that_an_earlier_run_left_to_a_person_limit_the_next_verdict(
    action: str, cause: str, off_by: int, decision: str | None, held: bool
) -> None:
    past = Past(row_id=1, action=action, cause=cause, off_by=off_by, decision=decision, found_at=START)
    found = drift(9_800, 9_000)
    history = past.history(found, now=START, min_age_seconds=60)
    assert history.held is held
    given = verdict(found, explained(("missed_decrement", 800)), history=history)
    assert given.policy == ("review" if held else "correct")


def test_a_drift_that_may_contain_held_tokens_awaits_review() -> None:
    history = History(held=True)
    given = verdict(drift(9_300, 9_000), explained(("missed_decrement", 300)), history=history)
    assert (given.policy, given.write) == ("review", None)
    # Also if another cause has lowered it since: a correction would take the purchase away.
    assert verdict(drift(8_700, 9_000), explained(("double_decrement", -300)), history=history).write is None
