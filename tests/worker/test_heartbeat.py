"""The heartbeat, with a real worker whose leases last a second and a half."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from celery import Celery

from tests.support import model_tasks
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess, close_connections, own_application, running_worker
from trueup.errors import HoldLifetimeError
from trueup.settings.settings import get_settings
from trueup.tasks.base import MAX_LOST_HOLDS

LEASES = "SELECT count(*) FROM trueup.hold WHERE user_id = :user AND lease_until > clock_timestamp()"
# Longer than two leases without a beat.
LONG_SECONDS = 5


@pytest.fixture(scope="module")
def app(shared_database: str) -> Iterator[Celery]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRUEUP_MODEL_TIMEOUT_SECONDS", "0.5")
        get_settings.cache_clear()
        app = own_application()
        app.control.purge()
        yield app
        close_connections(app)
    get_settings.cache_clear()


@pytest.fixture(scope="module")
def worker(app: Celery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    include = ("tests.support.short_leases", "tests.support.model_tasks")
    with running_worker(tmp_path_factory.mktemp("worker") / "worker.log", include=include) as worker:
        yield worker


@pytest.fixture
def host(shared_host: Host) -> Host:
    return shared_host


def test_a_body_that_works_longer_than_its_lease_keeps_its_hold_from_a_duplicate(
    app: Celery, worker: WorkerProcess, host: Host
) -> None:
    user = host.subscriber(1_000)
    result = model_tasks.spend.delay(user_id=user, seconds=LONG_SECONDS)
    wait_for(lambda: host.used(user), "the call is charged")
    before = host.value("SELECT expires_at FROM trueup.hold WHERE user_id = :user", user=user)
    model_tasks.spend.apply_async(kwargs={"user_id": user, "seconds": LONG_SECONDS}, task_id=result.id)
    assert result.get(timeout=DEADLINE_SECONDS) == host.used(user)
    row = host.execute("SELECT attempt, expires_at FROM trueup.hold WHERE user_id = :user", user=user).one()
    assert (row.attempt, row.expires_at > before) == (1, True)


def test_a_stopped_process_loses_its_lease(app: Celery, worker: WorkerProcess, host: Host) -> None:
    user = host.subscriber(1_000)
    result = model_tasks.spend.delay(user_id=user, seconds=LONG_SECONDS)
    wait_for(lambda: host.used(user), "the call is charged")
    owner = host.value("SELECT owner FROM trueup.hold WHERE user_id = :user", user=user)
    child = psutil.Process(int(owner.rpartition(":")[2]))
    child.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: not host.value(LEASES, user=user), "the lease ends")
    finally:
        child.send_signal(signal.SIGCONT)
    assert result.get(timeout=DEADLINE_SECONDS) == host.used(user)


def test_a_task_that_loses_its_hold_in_each_attempt_fails_and_names_the_setting(
    app: Celery, worker: WorkerProcess, host: Host
) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(HoldLifetimeError, match="TRUEUP_HOLD_MAX_SECONDS"):
        model_tasks.expiring.delay(user_id=user).get(timeout=DEADLINE_SECONDS)
    assert host.value("SELECT max(attempt) FROM trueup.hold WHERE user_id = :user", user=user) == MAX_LOST_HOLDS
    assert host.value("SELECT count(*) FROM trueup.charge WHERE user_id = :user", user=user) == 1, (
        "the paid call is replayed"
    )


def test_a_worker_whose_task_may_outlive_its_hold_does_not_start(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_HOLD_TTL_SECONDS", "30")
    monkeypatch.setenv("TRUEUP_TASK_TIME_LIMIT_SECONDS", "20")
    monkeypatch.setenv("TRUEUP_HOLD_MAX_SECONDS", "30")
    log = tmp_path / "refused.log"
    with pytest.raises(AssertionError), running_worker(log, include=("tests.support.model_tasks",)):
        pass
    assert (
        "Metered task test.soft: its time_limit of 30 s is not below TRUEUP_HOLD_MAX_SECONDS (30 s)" in log.read_text()
    )
