"""The harness is no good unless it finds what is wrong: each kind of violation, made by hand, is seen."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import Connection

from billing.charges import record_charge
from billing.holds import Hold, expire_holds
from tests.faults.checks import read_books, violations
from tests.faults.ledger import Ledger, Serving
from tests.faults.plans import plan_round
from tests.faults.rounds import Stage
from tests.faults.unrecorded import find_unrecorded
from tests.support.host import Host
from tests.support.work import hold_tokens, usage_of

BUDGET = 100
Found = Callable[[], set[str]]


@pytest.fixture
def stage(host: Host) -> Stage:
    """A round of one user that has been played, with nothing in it yet."""
    user = host.subscriber(BUDGET, start=datetime.now(UTC) - timedelta(days=1))
    provider = SimpleNamespace(ledger=Ledger())
    return Stage(
        plan=replace(plan_round(1, 0), budgets=(BUDGET,)),
        servers=None,  # type: ignore[arg-type] - not asked
        database="",
        engine=host.engine,
        provider=provider,  # type: ignore[arg-type] - only its ledger is asked
        workers=[],
        sender=None,  # type: ignore[arg-type] - not asked
        users=[user],
        settled=True,
    )


@pytest.fixture
def found(stage: Stage) -> Found:
    """Return the kinds of violations that the checks find now."""
    return lambda: {violation.kind for violation in violations(stage, read_books(stage))}


@pytest.fixture
def hold(connection: Connection, stage: Stage) -> Hold:
    return hold_tokens(connection, stage.users[0], 80, task="t1")


def serve(stage: Stage, billed: int, *, asked: int = 80, task: str = "t1", user: int | None = None) -> Serving:
    serving, _ = stage.provider.ledger.open(task_id=task, call=1, user_id=user or stage.users[0], pid=1, asked=asked)
    serving.billed, serving.complete, serving.ended_at = billed, True, serving.started_at
    return serving


def record(
    connection: Connection, hold: Hold, serving: Serving, *, tokens: int | None = None, key: str = "1:x"
) -> None:
    usage = usage_of(tokens or serving.billed, model_name=serving.model_name)
    record_charge(connection, hold, call_key=key, usage=usage, metadata={"task_id": hold.task_id})


def test_a_call_that_is_served_and_recorded_is_no_violation(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve(stage, 50))
    assert found() == set()


def test_what_the_provider_bills_over_what_it_was_asked_for_is_no_overshoot(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve(stage, BUDGET + 20, asked=80))
    assert found() == set()


def test_overshoot_is_found(stage: Stage, connection: Connection, hold: Hold, found: Found) -> None:
    record(connection, hold, serve(stage, BUDGET + 20, asked=BUDGET + 20))
    assert found() == {"overshoot"}


def test_overshoot_by_a_late_charge_is_told_apart(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    expire_holds(connection, now=datetime.now(UTC) + timedelta(days=1))
    record(connection, hold, serve(stage, BUDGET + 20, asked=BUDGET + 20))
    assert found() == {"late_overshoot"}


def test_a_serving_recorded_twice_is_found(stage: Stage, connection: Connection, hold: Hold, found: Found) -> None:
    serving = serve(stage, 30)
    record(connection, hold, serving)
    record(connection, hold, serving, key="1:y")
    assert found() == {"double_charge"}


def test_a_wrong_figure_is_found(stage: Stage, connection: Connection, hold: Hold, found: Found) -> None:
    record(connection, hold, serve(stage, 50), tokens=49)
    assert found() == {"wrong_usage"}


def test_usage_of_another_user_is_found(
    stage: Stage, host: Host, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve(stage, 50, user=host.subscriber(BUDGET)))
    assert found() == {"wrong_user"}


def test_a_lost_call_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    serve(stage, 50)
    assert found() == {"lost_usage"}


def test_a_call_without_a_hold_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    serve(stage, 0, task="t2")
    assert found() == {"unmetered_call"}


def test_a_leaked_hold_is_found(stage: Stage, host: Host, hold: Hold, found: Found) -> None:
    host.execute("UPDATE trueup.balance SET held = held + 7")
    assert found() == {"leaked_hold", "untrue_balance"}


def test_an_untrue_balance_is_found(stage: Stage, host: Host, hold: Hold, found: Found) -> None:
    host.execute("UPDATE trueup.balance SET consumed = consumed + 7")
    assert "untrue_balance" in found()


def test_a_task_that_vanished_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    stage.outcomes = {"t1": "no result", "never-begun": "no result"}
    assert found() == {"lost_task"}


def intent(bound: int) -> SimpleNamespace:
    return SimpleNamespace(user_id=7, task_id="t1", call=1, tokens_bound=bound)


def test_each_unrecorded_call_needs_a_row_of_its_own_with_a_bound_that_suffices() -> None:
    ledger = Ledger()
    for billed in (40, 60):
        serving, _ = ledger.open(task_id="t1", call=1, user_id=7, pid=1, asked=80)
        serving.billed = billed
    servings = ledger.servings()

    def named(*bounds: int) -> list[bool | None]:
        return [call.named for call in find_unrecorded(servings, set(), map(intent, bounds), {})]

    assert named(40, 60) == [True, True]
    assert named(60) == [False, True]
    assert named(50, 50) == [True, False]
    assert named() == [False, False]


def test_a_process_that_went_on_to_its_next_call_is_not_excused_by_its_later_death() -> None:
    ledger = Ledger()
    for call in (1, 2):
        serving, _ = ledger.open(task_id="t1", call=call, user_id=7, pid=1, asked=80)
        serving.billed, serving.complete = 40, True
    servings = ledger.servings()
    killed = {1: servings[1].started_at + 1}
    causes = [call.cause for call in find_unrecorded(servings, set(), None, killed)]
    assert causes == ["none", "process killed"]
