"""Tests of the harness: the checks of requests that share a task id, and of work that is done again."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.by_hand import SPENDING, serve
from tests.faults.planned import Spending
from tests.faults.prompts import Asked, label_of, prompt_of, read_prompt
from tests.faults.stages import Stage
from tests.support.host import Host
from trueup.gate.holds import Hold

Found = Callable[[], set[str]]
OTHER = replace(SPENDING, request=2, words=6)


def play(host: Host, stage: Stage, *tasks: Spending) -> None:
    """Let the plan have these tasks, and each of their requests a hold that has done its work, one after the other."""
    stage.plan = replace(stage.plan, tasks=tasks)
    host.execute("DELETE FROM trueup.hold")
    host.execute("UPDATE trueup.balance SET held = 0")
    for attempt, task in enumerate(tasks, 1):
        host.execute(
            "INSERT INTO trueup.hold (user_id, task_id, request, fresh_retries, attempt, retries, feature_name,"
            " section, owner, status, tokens_reserved, opened_at, lease_until, expires_at, closed_at, completed)"
            " VALUES (:user, 't1', :request, 0, :attempt, 0, 'Faults', 'chat', 'w:1', 'released', 0, now(), now(),"
            " now(), now(), true)",
            user=stage.users[task.user],
            request=task.fingerprint(stage.users[task.user]),
            attempt=attempt,
        )


def finish(stage: Stage, label: str, *answers: str) -> None:
    """Store a result under the id that the requests share."""
    stage.outcomes["t1"] = "done"
    stage.results["t1"] = {"request": label, "answers": list(answers), "spent": 0, "extensions": []}


@pytest.mark.parametrize(("label", "expected"), [("t1#2", set()), ("t1", {"wrong_result"})])
def test_a_result_of_an_earlier_request_with_the_same_id_is_found(
    stage: Stage, host: Host, hold: Hold, found: Found, label: str, expected: set[str]
) -> None:
    play(host, stage, SPENDING, OTHER)
    finish(stage, label)
    assert found() == expected


@pytest.mark.parametrize(("place", "expected"), [(0, {"wrong_result"}), (1, set())])
def test_a_result_whose_request_lost_its_hold_is_found_if_another_was_done_later(
    stage: Stage, host: Host, hold: Hold, found: Found, place: int, expected: set[str]
) -> None:
    tasks = [SPENDING, SPENDING]
    tasks[place] = OTHER
    play(host, stage, *tasks)
    lost = "UPDATE trueup.hold SET completed = false, status = 'expired' WHERE request = :request"
    host.execute(lost, request=OTHER.fingerprint(stage.users[OTHER.user]))
    finish(stage, OTHER.label)
    assert found() == expected


@pytest.mark.parametrize(("is_cut", "expected"), [(False, {"wrong_result"}), (True, set())])
def test_a_request_without_an_end_of_its_own_is_found_unless_redis_may_have_lost_it(
    stage: Stage, host: Host, hold: Hold, found: Found, is_cut: bool, expected: set[str]
) -> None:
    play(host, stage, SPENDING)
    stage.plan = replace(stage.plan, tasks=(SPENDING, OTHER))
    finish(stage, "t1")
    assert found() == set()  # it was sent while the first one ran, and is refused
    stage.sent_after = {OTHER.label}
    if is_cut:
        stage.note("redis_killed")
    assert found() == expected


@pytest.mark.parametrize(("request_number", "expected"), [(1, set()), (2, {"wrong_result"})])
def test_an_answer_to_another_request_is_found(
    stage: Stage, host: Host, hold: Hold, found: Found, request_number: int, expected: set[str]
) -> None:
    play(host, stage, SPENDING)
    serving, _ = stage.provider.ledger.open(
        task_id="t1", request=request_number, call=1, fingerprint="x", user_id=stage.users[0], pid=1, asked=80
    )
    serving.ended_at = serving.started_at
    finish(stage, "t1", serving.model_name)
    assert found() == expected


def test_a_hold_of_a_request_that_was_never_sent_is_found(stage: Stage, host: Host, hold: Hold, found: Found) -> None:
    play(host, stage, SPENDING, OTHER)
    stage.plan = replace(stage.plan, tasks=(SPENDING,))
    assert found() == {"wrong_result"}


@pytest.mark.parametrize(
    ("seconds", "stopped", "expected"),
    [(0, set(), set()), (60, set(), {"bought_again"}), (60, {1}, set())],
)
def test_a_call_after_its_request_was_done_is_found_unless_its_process_was_stopped(
    stage: Stage, host: Host, hold: Hold, found: Found, seconds: int, stopped: set[int], expected: set[str]
) -> None:
    play(host, stage, SPENDING)
    serve(stage, 0).started_at += seconds
    stage.stopped = stopped
    assert found() == expected


@pytest.mark.parametrize("change", ["attempt = 2", "status = 'expired'"])
@pytest.mark.parametrize("fault", ["none", "killed", "stopped", "postgres_restarted"])
def test_a_task_that_lost_its_hold_while_its_process_lived_is_found(
    stage: Stage, host: Host, hold: Hold, found: Found, change: str, fault: str
) -> None:
    play(host, stage, replace(SPENDING, works=9.5))
    serve(stage, 0)
    assert found() == set()
    host.execute(f"UPDATE trueup.hold SET {change}")
    if fault == "killed":
        stage.killed = {1: 0.0}
    elif fault == "stopped":
        stage.stopped = {1}
    elif fault != "none":
        stage.note(fault)
    assert found() == ({"ran_again"} if fault == "none" else set())


def test_a_prompt_names_its_request() -> None:
    for request in (1, 2):
        asked = read_prompt(f"Answer: {prompt_of(label_of('r0-t5', request), 3, 9, 2)}")
        assert asked == Asked(task_id="r0-t5", request=request, call=3, user_id=9)
