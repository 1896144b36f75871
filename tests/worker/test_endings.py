"""A real worker: every canvas passes the gate, and a hold ends in the right state however its task or worker ends."""

import signal
from pathlib import Path

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, WorkerLostError
from celery.exceptions import TimeoutError as ResultTimeoutError

from tests.support import model_tasks
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess, running_worker
from tests.worker.conftest import TASKS
from trueup.errors import TokensDenied
from trueup.tasks.requests import CELERY_RETRIES_LOST_TASKS


def holds_of(host: Host, user: int) -> list[tuple[str, int]]:
    """Return status and calls of each hold the user's tasks have had, oldest first."""
    rows = host.execute("SELECT status, calls FROM trueup.hold WHERE user_id = :user ORDER BY id", user=user)
    return [tuple(row) for row in rows]


def held(host: Host, user: int) -> int:
    tokens: int = host.value("SELECT held FROM trueup.balance WHERE user_id = :user", user=user)
    return tokens


def test_groups_chains_and_chords_hold_for_each_of_their_tasks(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(10_000)
    spend = model_tasks.spend.si(user_id=user)
    spent = [
        *group(spend, spend)().get(timeout=DEADLINE_SECONDS),
        chain(spend, spend)().get(timeout=DEADLINE_SECONDS),
        chord([spend, spend], model_tasks.total.s())().get(timeout=DEADLINE_SECONDS),
    ]
    assert holds_of(shared_host, user) == [("settled", 1)] * 6
    assert shared_host.used(user) == 6 * spent[0]
    assert spent == [spent[0]] * 3 + [2 * spent[0]]


def test_a_denied_member_of_a_chord_spends_nothing_and_its_body_does_not_run(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    rich, poor = shared_host.subscriber(1_000), shared_host.subscriber(10)
    members = [model_tasks.spend.si(user_id=rich), model_tasks.spend.si(user_id=poor)]
    work = chord(members, model_tasks.spend.si(user_id=rich, words=20))()
    with pytest.raises(TokensDenied):
        work.parent.results[1].get(timeout=DEADLINE_SECONDS)
    wait_for(lambda: holds_of(shared_host, rich) == [("settled", 1)], "the other member is done")
    with pytest.raises((TokensDenied, ChordError, ResultTimeoutError)):
        work.get(timeout=1)
    assert holds_of(shared_host, poor) == []
    assert holds_of(shared_host, rich) == [("settled", 1)]


@pytest.mark.parametrize("tokens", [1_000, 10])
def test_a_task_that_replaces_another_passes_the_gate_itself(
    app: Celery, worker: WorkerProcess, shared_host: Host, tokens: int
) -> None:
    first, successor = shared_host.subscriber(1_000), shared_host.subscriber(tokens)
    result = model_tasks.replaced.delay(user_id=first, successor=successor)
    if tokens < 100:
        with pytest.raises(TokensDenied):
            result.get(timeout=DEADLINE_SECONDS)
    else:
        assert result.get(timeout=DEADLINE_SECONDS) == shared_host.used(successor)
    assert holds_of(shared_host, first) == [("settled", 1)]
    assert holds_of(shared_host, successor) == ([("settled", 1)] if tokens > 100 else [])


def test_a_task_that_ends_its_process_is_retried_pays_once_and_leaves_no_hold(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    with pytest.raises((WorkerLostError, SystemExit)):
        model_tasks.leave.delay(user_id=user).get(timeout=DEADLINE_SECONDS)
    wait_for(lambda: not held(shared_host, user), "nothing is held")
    # The retry replays the first attempt's charge. Celery before 5.7 does not retry.
    second = [("released", 0)] if CELERY_RETRIES_LOST_TASKS else []
    assert holds_of(shared_host, user) == [("settled", 1), *second]
    assert shared_host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_worker_that_is_asked_to_stop_lets_its_task_end(
    app: Celery, shared_host: Host, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGTERM is warm; SIGQUIT is cold, but softened: tasks have some time to end."""
    user = shared_host.subscriber(1_000)
    # Celery waits for all of this time, even without a running task.
    soft = ("--", "worker.soft_shutdown_timeout=4")
    with running_worker(tmp_path / "worker.log", queues=("stopping",), include=(TASKS,), more=soft) as stopping:
        model_tasks.spend.apply_async(kwargs={"user_id": user, "seconds": 2}, queue="stopping")
        wait_for(lambda: shared_host.used(user), "the call is charged")
        stopping.process.send_signal(number)
        stopping.process.wait(DEADLINE_SECONDS)
    assert holds_of(shared_host, user) == [("settled", 1)]
    assert held(shared_host, user) == 0
