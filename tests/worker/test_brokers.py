"""Brokers other than one plain Redis: Sentinels with a failover, TLS with client certificates, and those refused."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from celery import Celery

from tests.support.host import Host
from tests.support.redis_servers import running_redis, running_sentinel
from tests.support.tcp_proxy import proxy_to
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import close_connections, running_worker
from tests.worker.conftest import TASKS
from trueup.errors import SettingsError
from trueup.settings.settings import Settings, read_settings
from trueup.worker import redis_transport
from trueup.worker.config import celery_config, client_config
from trueup.worker.doctor import check_server


@contextmanager
def sender() -> Iterator[Celery]:
    redis_transport.register()
    app = Celery("brokers", set_as_current=False)
    app.config_from_object(client_config(read_settings()))
    yield app
    close_connections(app)
    app.close()


def spend(app: Celery, user: int) -> int:
    result = app.send_task("test.spend", kwargs={"user_id": user}, queue="trueup-ai")
    tokens: int = result.get(timeout=DEADLINE_SECONDS)
    return tokens


def test_a_worker_follows_the_sentinels_to_the_new_master(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(10_000)
    with running_redis() as master, running_redis(f"replicaof 127.0.0.1 {master.port}") as replica:
        with running_sentinel(master) as sentinel:
            with sentinel.client() as client:
                wait_for(lambda: client.sentinel_slaves("books"), "the Sentinel knows the replica")
            monkeypatch.setenv("TRUEUP_BROKER_URL", f"sentinel://127.0.0.1:{sentinel.port}/1")
            monkeypatch.setenv("TRUEUP_SENTINEL_MASTER", "books")
            with running_worker(tmp_path / "worker.log", include=(TASKS,)) as worker:
                with sender() as app:
                    assert spend(app, user) == host.used(user)
                master.kill()
                with sentinel.client() as client:
                    address = ("127.0.0.1", replica.port)
                    wait_for(lambda: client.sentinel_get_master_addr_by_name("books") == address, "the failover")
                with sender() as app:
                    assert spend(app, user) * 2 == host.used(user)
                assert worker.process.poll() is None
