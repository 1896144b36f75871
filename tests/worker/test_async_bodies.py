"""Real workers run `async def` bodies: in processes and in threads, under time limits, and when a body exits."""

from collections.abc import Iterator

import pytest
from celery import Celery, group
from celery.exceptions import SoftTimeLimitExceeded, WorkerLostError

from tests.support import async_tasks
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS
from tests.support.worker import WorkerProcess, running_worker
from tests.worker.test_endings import held, holds_of

TASKS = "tests.support.async_tasks"


@pytest.fixture(scope="module", params=["prefork", "threads"])
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def worker(pool: str, app: Celery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    concurrency = 1 if pool == "prefork" else 4
    with running_worker(log, include=(TASKS,), concurrency=concurrency, more=("-P", pool)) as worker:
        yield worker


def test_async_bodies_of_a_worker_process_share_one_loop_and_pay_once_each(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(10_000)
    work = group(async_tasks.async_spend.si(user_id=user, calls=3) for _ in range(6))()
    done = work.get(timeout=DEADLINE_SECONDS)
    assert len({one["loop"] for one in done}) == 1
    for result, one in zip(work.results, done, strict=True):
        assert one["seen"] == [[result.id, result.id]] * 2
    assert shared_host.used(user) == sum(one["spent"] for one in done)
    assert holds_of(shared_host, user) == [("settled", 3)] * 6
    assert_true(shared_host)


@pytest.mark.parametrize("partly", [False, True], ids=["ends", "returns a part"])
def test_a_soft_time_limit_cancels_an_async_body(
    partly: bool, pool: str, app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    if pool == "threads":
        pytest.skip("Celery has no time limits in threads")
    user = shared_host.subscriber(10_000)
    result = async_tasks.async_slow.delay(user_id=user, partly=partly)
    if partly:
        assert result.get(timeout=DEADLINE_SECONDS) == "a part"
    else:
        with pytest.raises(SoftTimeLimitExceeded):
            result.get(timeout=DEADLINE_SECONDS)
    assert holds_of(shared_host, user) == [("settled", 1)]
    assert held(shared_host, user) == 0
    again = async_tasks.async_spend.delay(user_id=user).get(timeout=DEADLINE_SECONDS)
    assert again["spent"] > 0


def test_an_async_body_that_ends_its_process_leaves_nothing_held(
    pool: str, app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    if pool == "threads":
        pytest.skip("a body in a thread would end the worker")
    user = shared_host.subscriber(10_000)
    with pytest.raises((WorkerLostError, SystemExit)):
        async_tasks.async_leave.delay(user_id=user).get(timeout=DEADLINE_SECONDS)
    assert holds_of(shared_host, user) == [("settled", 1)]
    assert held(shared_host, user) == 0
