"""Redis is down for some seconds while a worker runs a task with a late acknowledgement."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from celery import Celery

from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import close_connections, running_worker
from trueup.settings.settings import Settings
from trueup.stack import running_stack
from trueup.stack.layout import Layout
from trueup.stack.servers.redis import RedisServer
from trueup.worker.config import celery_config

AWAY_SECONDS = 4.0
TASKS = "tests.support.slow_tasks"


@pytest.fixture
def redis_home(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Redis of the test's own, for the session's must not be stopped. Gives its home."""
    monkeypatch.delenv("TRUEUP_BROKER_URL")
    # Short, or its socket would be elsewhere, and Redis not be known by it.
    with TemporaryDirectory(prefix="trueup-test-") as folder:
        home = Path(folder) / "redis"
        with running_stack(Settings(home=home), services=("redis",)) as urls:
            monkeypatch.setenv("TRUEUP_BROKER_URL", str(urls.broker_url))
            yield home


@pytest.fixture
def app(redis_home: Path) -> Iterator[Celery]:
    app = Celery("away", set_as_current=False)
    app.config_from_object(celery_config(Settings()))
    yield app
    close_connections(app)
    app.close()


def test_a_worker_survives_a_redis_outage_of_seconds(
    redis_home: Path, app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_worker(tmp_path / "worker.log", include=(TASKS,)) as worker:
        result = app.send_task("test.slow", args=(AWAY_SECONDS + 3,), queue="trueup-ai")
        wait_for(lambda: result.state == "STARTED", "the task has started")
        close_connections(app)  # Celery drops broken connections without closing them
        [redis] = RedisServer(Layout(home=redis_home)).processes()
        redis.send_signal(signal.SIGTERM)
        redis.wait(DEADLINE_SECONDS)
        # The length of the outage is the subject of the test, not a wait for an event.
        time.sleep(AWAY_SECONDS)
        monkeypatch.delenv("TRUEUP_BROKER_URL")
        with running_stack(Settings(home=redis_home), services=("redis",)):
            wait_for(lambda: _answers(app), "the worker is back")
            assert app.send_task("test.slow", args=(0,), queue="trueup-ai").get(timeout=DEADLINE_SECONDS) == "done"
            assert worker.process.poll() is None


def _answers(app: Celery) -> bool:
    return bool(app.control.ping(timeout=1.0))
