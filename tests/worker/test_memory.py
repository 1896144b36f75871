"""Memory is short: in a task's body, in its process, or in Redis."""

from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import WorkerLostError
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.memory_tasks import exhausting, killed
from tests.support.redis_servers import running_redis
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.work import balance
from tests.support.worker import close_connections, own_application, running_worker
from tests.worker.conftest import TASKS
from trueup.errors import OutOfMemoryError
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.settings.settings import read_settings
from trueup.worker import redis_transport
from trueup.worker.config import client_config

FULL = "maxmemory-policy noeviction"


def test_a_body_without_memory_or_whose_process_is_killed_fails_alone_and_pays_once(host: Host, tmp_path: Path) -> None:
    """Celery ends the whole worker when a task raises MemoryError, and each one to which the task is redelivered."""
    users = [host.subscriber(1_000), host.subscriber(1_000)]
    app = own_application()
    app.control.purge()
    with running_worker(tmp_path / "worker.log", include=("tests.support.memory_tasks", TASKS)) as worker:
        with pytest.raises(OutOfMemoryError, match="ran out of memory"):
            exhausting.delay(user_id=users[0]).get(timeout=DEADLINE_SECONDS)
        with pytest.raises(WorkerLostError):
            killed.delay(user_id=users[1]).get(timeout=DEADLINE_SECONDS)
        assert worker.process.poll() is None
        for user in users:
            wait_for(lambda user=user: balance(host, user) == (host.used(user), 0), "nothing is held")
            rows = host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user)
            assert rows == 1, "the retry replays the paid call"
    close_connections(app)


def test_a_task_that_a_full_redis_can_not_requeue_stays_in_its_queue_and_runs_later(
    host: Host, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(1_000)
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    with running_redis(FULL) as server, server.client() as client:
        monkeypatch.setenv("TRUEUP_BROKER_URL", f"redis://127.0.0.1:{server.port}/0")
        monkeypatch.setenv("TRUEUP_VISIBILITY_TIMEOUT_SECONDS", "20")
        monkeypatch.setenv("TRUEUP_TASK_TIME_LIMIT_SECONDS", "15")
        redis_transport.register()
        app = Celery("memory", set_as_current=False)
        app.config_from_object(client_config(read_settings()))
        with running_worker(tmp_path / "worker.log", include=(TASKS,)) as worker:
            result = app.send_task("test.spend", kwargs={"user_id": user}, queue="trueup-ai")
            wait_for(lambda: "task waits" in worker.output, "the task waits at the gate")
            client.config_set("maxmemory", "1mb")  # less than it uses: Redis refuses whatever needs memory
            wait_for(lambda: "broker took no new message" in worker.output, "the requeue is refused")
            assert not host.used(user)
            client.config_set("maxmemory", "0")
            attach(HostMapping())
            assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0
            assert worker.process.poll() is None
        del result  # collecting it unsubscribes it, which needs its server
        close_connections(app)
        app.close()
    assert host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user) == 1
