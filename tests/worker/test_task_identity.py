"""Task ids and retries, with a real worker and a real result backend."""

from typing import Any

import pytest
from celery import Celery

from tests.support import model_tasks
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess
from trueup.errors import TaskIdReusedError, TokensDenied
from trueup.tasks.requests import CELERY_RETRIES_LOST_TASKS


def stored(app: Celery, task_id: str) -> dict[str, Any]:
    meta: dict[str, Any] = app.backend.get_task_meta(task_id, cache=False)
    return meta


def test_a_finished_tasks_id_with_other_arguments_gets_its_own_result(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    first = model_tasks.spend.apply_async(kwargs={"user_id": user, "words": 10}, task_id="digest-1")
    shorter = first.get(timeout=DEADLINE_SECONDS)
    second = model_tasks.spend.apply_async(kwargs={"user_id": user, "words": 30}, task_id="digest-1")
    assert second.get(timeout=DEADLINE_SECONDS) == shared_host.used(user) - shorter > shorter
    again = model_tasks.spend.apply_async(kwargs={"user_id": user, "words": 30}, task_id="digest-1")
    assert again.state == "SUCCESS", "the stored result of the same request stays"


@pytest.mark.parametrize("of", ["the same user", "another user"])
def test_a_redelivery_after_another_request_with_its_id_gives_its_own_result(
    app: Celery, worker: WorkerProcess, shared_host: Host, of: str
) -> None:
    """Its first attempt died, then the other request had the id."""
    user, task_id = shared_host.subscriber(1_000), f"digest-7-{of}"
    other = user if of == "the same user" else shared_host.subscriber(1_000)
    closed = "SELECT count(*) FROM trueup.hold WHERE task_id = :task AND closed_at IS NOT NULL"

    def send(one: int, words: int) -> int:
        before = shared_host.value(closed, task=task_id)
        kwargs = {"user_id": one, "words": words}
        app.send_task("test.spend", kwargs=kwargs, task_id=task_id, queue="trueup-ai")
        wait_for(lambda: shared_host.value(closed, task=task_id) > before, "the hold is closed")
        wait_for(lambda: stored(app, task_id)["status"] == "SUCCESS", "it succeeds")
        result: int = stored(app, task_id)["result"]
        return result

    first = send(user, 10)
    shared_host.execute("UPDATE trueup.hold SET completed = false WHERE task_id = :task", task=task_id)
    assert send(other, 30) > first
    wait_for(lambda: send(user, 10) == first, "its own result is stored", seconds=20)
    assert shared_host.used(user) >= first


def test_a_later_request_with_an_id_never_gets_the_result_of_a_redelivery_of_the_earlier_one(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    closed = "SELECT count(*) FROM trueup.hold WHERE task_id = 'digest-8' AND closed_at IS NOT NULL"
    for number, (task, state) in enumerate(
        [("test.spend", "SUCCESS"), ("test.fail", "FAILURE"), ("test.spend", "FAILURE")], start=1
    ):
        app.send_task(task, kwargs={"user_id": user}, task_id="digest-8", queue="trueup-ai")
        wait_for(lambda number=number: shared_host.value(closed) == number, "the hold is closed")
        wait_for(lambda state=state: stored(app, "digest-8")["status"] == state, f"its state is {state}")
    wait_for(lambda: shared_host.value(closed) == 3, "the redelivery ends")
    assert not isinstance(stored(app, "digest-8")["result"], TaskIdReusedError), "the later request's failure stays"


def test_a_users_task_never_gets_the_result_of_another_users_task_with_its_id(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    users = [shared_host.subscriber(1_000), shared_host.subscriber(1_000)]
    for user, words in zip(users, (10, 30), strict=True):
        # By its name, as from a service that does not know the task: nothing is compared when it is sent.
        app.send_task("test.spend", kwargs={"user_id": user, "words": words}, task_id="digest-4", queue="trueup-ai")
        wait_for(lambda user=user: shared_host.used(user), "the task spends")
        wait_for(lambda: stored(app, "digest-4")["status"] == "SUCCESS", "it ends")
    assert stored(app, "digest-4")["result"] == shared_host.used(users[1])


def test_a_denied_request_never_gets_the_result_of_another_request_with_its_id(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user, poor = shared_host.subscriber(1_000), shared_host.subscriber(1)
    for one, state in ((user, "SUCCESS"), (poor, "FAILURE")):
        # By its name, as from a service that does not know the task: nothing is compared when it is sent.
        app.send_task("test.spend", kwargs={"user_id": one}, task_id="digest-5", queue="trueup-ai")
        wait_for(lambda state=state: app.backend.get_state("digest-5") == state, f"it ends as {state}")
    assert shared_host.used(user) > shared_host.used(poor) == 0


@pytest.mark.parametrize("of", ["the same user", "another user"])
def test_a_redelivery_of_done_work_leaves_the_denial_of_a_later_request_with_its_id(
    app: Celery, worker: WorkerProcess, shared_host: Host, of: str
) -> None:
    user, task_id = shared_host.subscriber(1_000), f"digest-9-{of}"
    poor = user if of == "the same user" else shared_host.subscriber(1)
    ended = "SELECT count(*) FROM trueup.hold WHERE task_id = :task AND closed_at IS NOT NULL"
    for one, tokens, state in ((user, 100, "SUCCESS"), (poor, 20_000, "FAILURE")):
        kwargs = {"user_id": one, "tokens": tokens}
        app.send_task("test.measured", kwargs=kwargs, task_id=task_id, queue="trueup-ai")
        wait_for(lambda state=state: app.backend.get_state(task_id) == state, f"it ends as {state}")
    kwargs = {"user_id": user, "tokens": 100}
    app.send_task("test.measured", kwargs=kwargs, task_id=task_id, queue="trueup-ai")
    wait_for(lambda: shared_host.value(ended, task=task_id) == 2, "the redelivery ends")
    assert isinstance(stored(app, task_id)["result"], TokensDenied)


def test_the_state_started_is_told_once_the_gate_has_admitted_the_task(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    kwargs = {"user_id": shared_host.subscriber(1_000), "seconds": 3}
    result = app.send_task("test.spend", kwargs=kwargs, queue="trueup-ai")
    wait_for(lambda: result.state == "STARTED", "it is started")
    assert result.info["pid"] > 0
    assert result.get(timeout=DEADLINE_SECONDS)


def test_a_task_whose_result_is_ignored_leaves_no_state(app: Celery, worker: WorkerProcess, shared_host: Host) -> None:
    user = shared_host.subscriber(1_000)
    result = app.send_task("test.spend", kwargs={"user_id": user}, queue="trueup-ai", ignore_result=True)
    closed = "SELECT count(*) FROM trueup.hold WHERE task_id = :task AND closed_at IS NOT NULL"
    wait_for(lambda: shared_host.value(closed, task=result.id) == 1, "the hold is closed")
    assert stored(app, result.id)["status"] == "PENDING"


def test_a_redelivery_of_done_work_does_not_run_the_body_again_while_its_result_is_stored(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user, seconds = shared_host.subscriber(1_000), 5
    durations = "SELECT extract(epoch FROM closed_at - opened_at) FROM trueup.hold WHERE user_id = :user ORDER BY id"
    for delivery in (1, 2):
        kwargs = {"user_id": user, "seconds": seconds}
        result = app.send_task("test.spend", kwargs=kwargs, task_id="digest-6", queue="trueup-ai")
        assert result.get(timeout=DEADLINE_SECONDS) == shared_host.used(user)
        wait_for(
            lambda delivery=delivery: (
                [row[0] is None for row in shared_host.execute(durations, user=user)] == [False] * delivery
            ),
            "the hold is closed",
        )
    first, second = [row[0] for row in shared_host.execute(durations, user=user)]
    assert second < seconds <= first


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_redelivery_of_done_work_whose_result_is_ignored_runs_the_body_only_if_tasks_follow(
    app: Celery, worker: WorkerProcess, shared_host: Host, is_followed: bool
) -> None:
    user, task_id = shared_host.subscriber(1_000), f"ignored-{is_followed}"
    link = [model_tasks.spend.si(user_id=user, seconds=0)] if is_followed else None
    closed = "SELECT closed_at - opened_at FROM trueup.hold WHERE task_id = :task_id ORDER BY id"
    for delivery in (1, 2):
        app.send_task(
            "test.spend",
            kwargs={"user_id": user, "seconds": 3},
            task_id=task_id,
            queue="trueup-ai",
            ignore_result=True,
            link=link if delivery == 2 else None,
        )
        wait_for(
            lambda delivery=delivery: (
                [row[0] is None for row in shared_host.execute(closed, task_id=task_id)] == [False] * delivery
            ),
            "the hold is closed",
        )
    durations = [row[0].total_seconds() for row in shared_host.execute(closed, task_id=task_id)]
    assert [duration >= 3 for duration in durations] == [True, is_followed]


def test_a_finished_task_whose_result_was_forgotten_gives_it_again(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    results = []
    for words in (10, 10, 30):
        result = model_tasks.spend.apply_async(kwargs={"user_id": user, "words": words}, task_id="digest-2")
        results.append(result.get(timeout=DEADLINE_SECONDS))
        result.forget()
    assert results[0] == results[1] < results[2]
    assert shared_host.used(user) == results[0] + results[2]


def test_an_id_in_use_fails_the_other_request_and_leaves_the_running_task_alone(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    running = model_tasks.spend.apply_async(kwargs={"user_id": user, "seconds": 3}, task_id="digest-3")
    wait_for(lambda: shared_host.used(user), "the call is charged")
    model_tasks.spend.apply_async(kwargs={"user_id": user, "words": 30}, task_id="digest-3")
    with pytest.raises(TaskIdReusedError, match="digest-3 is in use"):
        running.get(timeout=DEADLINE_SECONDS)
    wait_for(lambda: app.AsyncResult("digest-3").state == "SUCCESS", "the running task ends")
    assert app.AsyncResult("digest-3").get(timeout=DEADLINE_SECONDS) == shared_host.used(user)
    assert shared_host.value("SELECT count(*) FROM trueup.hold WHERE user_id = :user", user=user) == 1


def test_a_task_that_another_replaces_leaves_it_the_id_at_once(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    result = model_tasks.replaced.delay(user_id=user, successor=user)
    assert 0 < result.get(timeout=DEADLINE_SECONDS) < shared_host.used(user)
    statuses = shared_host.execute("SELECT status FROM trueup.hold WHERE user_id = :user", user=user)
    assert [row.status for row in statuses] == ["settled", "settled"]


@pytest.mark.skipif(not CELERY_RETRIES_LOST_TASKS, reason="before 5.7, Celery does not retry a lost task")
def test_a_crash_inside_a_retry_replays_what_that_retry_has_bought(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    result = model_tasks.picky.delay(user_id=user, good_at=1, seconds=3)
    count = "SELECT count(*) FROM trueup.charge WHERE user_id = :user"
    wait_for(lambda: shared_host.value(count, user=user) == 2, "the retry has bought its own answer")
    owner = shared_host.value("SELECT owner FROM trueup.hold WHERE status = 'open' AND user_id = :user", user=user)
    [child] = [process for process in worker.pool() if str(process.pid) == owner.rpartition(":")[2]]
    child.kill()
    assert result.get(timeout=DEADLINE_SECONDS) > 0
    assert shared_host.value(count, user=user) == 2
