"""A round of the fault harness, and no violated invariant.

A long test plays enough rounds for every kind of fault, and `make faults` plays any.
"""

import pytest

from tests.faults.kinds import FAULTS_PER_ROUND, GRAPH_KINDS, KINDS, PROVIDER_KINDS
from tests.faults.plans import RoundPlan, plan_round
from tests.faults.report import Totals
from tests.faults.runs import run_rounds

pytestmark = pytest.mark.xdist_group("faults")  # they share a slow fixture

SEED = 11
ALL = -(-len(KINDS) // FAULTS_PER_ROUND)  # enough rounds to draw every kind


@pytest.fixture(
    scope="module",
    params=[(SEED, 1), pytest.param((SEED + 1, ALL), marks=pytest.mark.long)],
    ids=lambda param: f"seed {param[0]}, {param[1]} rounds",
)
def plans(request: pytest.FixtureRequest) -> list[RoundPlan]:
    seed, rounds = request.param
    return [plan_round(seed, number) for number in range(rounds)]


@pytest.fixture(scope="module")
def said(plans: list[RoundPlan]) -> list[str]:
    return []


@pytest.fixture(scope="module")
def totals(plans: list[RoundPlan], said: list[str], _no_settings_from_outside: None) -> Totals:
    return run_rounds(plans, said.append)


def test_no_invariant_is_violated_by_any_fault(totals: Totals, said: list[str]) -> None:
    assert not totals.violations, "\n".join(said)


def test_the_planned_faults_struck(plans: list[RoundPlan], totals: Totals) -> None:
    planned = {fault.kind for plan in plans for fault in plan.faults}
    if len(plans) == ALL:
        planned = {*KINDS, *PROVIDER_KINDS, *GRAPH_KINDS}
    # On a busy machine some may find nothing to strike.
    assert len(planned - {kind for kind in planned if totals.faults[kind]}) <= 3, totals.faults


def test_the_rounds_had_something_to_lose(plans: list[RoundPlan], totals: Totals) -> None:
    rounds = len(plans)
    assert totals.outcomes["done"] >= 7 * rounds
    assert totals.outcomes["TokensDenied"] > 0
    assert totals.figures["calls recorded"] > 13 * rounds
    assert totals.figures["balance checks during rounds"] > 7 * rounds
    assert totals.figures["accepted by Instagram"] >= 3 * rounds
    assert totals.figures["streams broken"] > 0
    assert totals.figures["streams ended early by their task"] > 0
    assert totals.figures["extensions granted"] > 0
    assert totals.figures["tasks done that worked longer than a hold lives"] > 0
    if rounds == ALL:
        assert totals.figures["extensions denied"] > 0
        assert totals.figures["requests sent when another with their id had its result"] > 0


def test_a_round_is_drawn_from_its_seed_and_number_alone() -> None:
    assert plan_round(SEED, 5) == plan_round(SEED, 5)
    assert plan_round(SEED, 5) != plan_round(SEED, 6)
    assert plan_round(SEED, 5) != plan_round(SEED + 1, 5)
