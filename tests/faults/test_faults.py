"""A short run of the fault harness: every kind of fault, and no violated invariant.

A long test plays another seed, and `make faults` plays any.
"""

import pytest

from tests.faults.kinds import FAULTS_PER_ROUND, GRAPH_KINDS, KINDS, PROVIDER_KINDS
from tests.faults.plans import plan_round
from tests.faults.report import Totals
from tests.faults.runs import run_rounds

pytestmark = pytest.mark.xdist_group("faults")  # they share a slow fixture

SEED = 11
ROUNDS = -(-len(KINDS) // FAULTS_PER_ROUND)  # enough to draw every kind


@pytest.fixture(scope="module", params=[SEED, pytest.param(SEED + 1, marks=pytest.mark.long)])
def seed(request: pytest.FixtureRequest) -> int:
    seed: int = request.param
    return seed


@pytest.fixture(scope="module")
def said(seed: int) -> list[str]:
    return []


@pytest.fixture(scope="module")
def totals(seed: int, said: list[str], _no_settings_from_outside: None) -> Totals:
    return run_rounds([plan_round(seed, number) for number in range(ROUNDS)], said.append)


def test_no_invariant_is_violated_by_any_fault(totals: Totals, said: list[str]) -> None:
    assert not totals.violations, "\n".join(said)


def test_faults_of_every_kind_struck(totals: Totals) -> None:
    kinds = {*KINDS, *PROVIDER_KINDS, *GRAPH_KINDS}
    # On a busy machine some may find nothing to strike.
    assert len(kinds - {kind for kind in kinds if totals.faults[kind]}) <= 3, totals.faults


def test_the_rounds_had_something_to_lose(totals: Totals) -> None:
    assert totals.outcomes["done"] > 20
    assert totals.outcomes["TokensDenied"] > 0
    assert totals.figures["calls recorded"] > 40
    assert totals.figures["balance checks during rounds"] > 20
    assert totals.figures["accepted by Instagram"] > 10
    assert totals.figures["streams broken"] > 0
    assert totals.figures["streams ended early by their task"] > 0
    assert totals.figures["extensions granted"] > 0
    assert totals.figures["extensions denied"] > 0
    assert totals.figures["requests sent when another with their id had its result"] > 0
    assert totals.figures["tasks done that worked longer than a hold lives"] > 0


def test_a_round_is_drawn_from_its_seed_and_number_alone() -> None:
    assert plan_round(SEED, 5) == plan_round(SEED, 5)
    assert plan_round(SEED, 5) != plan_round(SEED, 6)
    assert plan_round(SEED, 5) != plan_round(SEED + 1, 5)
