"""Brokers other than one plain Redis: Sentinels with a failover, TLS with client certificates, and those refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from celery import Celery

from tests.support.host import Host
from tests.support.redis_servers import running_redis, running_sentinel
from tests.support.tls_proxy import make_certificate, tls_proxy_to
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import close_connections, running_worker
from tests.worker.conftest import TASKS
from trueup.cli.client import celery_client
from trueup.errors import SettingsError
from trueup.settings.settings import Settings, read_settings
from trueup.worker import redis_transport
from trueup.worker.config import celery_config, client_config
from trueup.worker.doctor import check_server, examine_broker


@contextmanager
def sender() -> Iterator[Celery]:
    redis_transport.register()
    app = Celery("brokers", set_as_current=False)
    app.config_from_object(celery_config(read_settings()))
    yield app
    close_connections(app)
    app.close()


def examined() -> set[tuple[str, str]]:
    """Return check and level of doctor's findings about the broker and the workers."""
    with celery_client(read_settings()) as app:
        return {(found.check, found.level) for found in examine_broker(app, read_settings(), None)}


def spend(app: Celery, user: int) -> int:
    result = app.send_task("test.spend", kwargs={"user_id": user}, queue="trueup-ai")
    tokens: int = result.get(timeout=DEADLINE_SECONDS)
    return tokens


def test_a_worker_follows_the_sentinels_to_the_new_master(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(10_000)
    with (
        running_redis() as master,
        running_redis(f"replicaof 127.0.0.1 {master.port}") as replica,
        running_sentinel(master) as sentinel,
        sentinel.client() as client,
    ):
        wait_for(lambda: client.sentinel_slaves("books"), "the Sentinel knows the replica")
        monkeypatch.setenv("TRUEUP_BROKER_URL", f"sentinel://127.0.0.1:{sentinel.port}/1")
        monkeypatch.setenv("TRUEUP_SENTINEL_MASTER", "books")
        with running_worker(tmp_path / "worker.log", include=(TASKS,)) as worker:
            with sender() as app:
                assert spend(app, user) == host.used(user)
            assert {("redis", "ok"), ("workers", "ok")} <= examined()
            master.kill()
            address = ("127.0.0.1", replica.port)
            wait_for(lambda: client.sentinel_get_master_addr_by_name("books") == address, "the failover")
            with sender() as app:
                assert spend(app, user) * 2 == host.used(user)
            assert worker.process.poll() is None


def test_a_worker_logs_in_at_redis_with_a_client_certificate(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(10_000)
    certificate, key = make_certificate(tmp_path)
    with running_redis() as server, tls_proxy_to(server.port, certificate, key) as port:
        files = f"ssl_ca_certs={certificate}&ssl_certfile={certificate}&ssl_keyfile={key}"
        monkeypatch.setenv("TRUEUP_BROKER_URL", f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=required&{files}")
        with running_worker(tmp_path / "worker.log", include=(TASKS,)), sender() as app:
            assert spend(app, user) == host.used(user) > 0
        with pytest.raises(redis.ConnectionError):
            redis.Redis(port=port, ssl=True, ssl_ca_certs=str(certificate)).ping()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "amqp://guest@127.0.0.1//",
            "trueup's own workers use Redis and not RabbitMQ.*Your own Celery application may keep RabbitMQ",
        ),
        ("pyamqp://guest@127.0.0.1//", "trueup's own workers use Redis and not RabbitMQ"),
        ("redis_cluster://127.0.0.1:7000", "don't work on a Redis Cluster"),
        ("redis+cluster://127.0.0.1:7000", "don't work on a Redis Cluster"),
        ("redis+sentinel://127.0.0.1:26379", "write sentinel://"),
        ("valkey://127.0.0.1:6379", "write redis:// for Valkey too"),
        ("sentinel://127.0.0.1:26379;amqp://127.0.0.1", "trueup's own workers use Redis and not RabbitMQ"),
        ("sqs://", "give a Redis URL"),
    ],
)
@pytest.mark.parametrize("setting", ["BROKER_URL", "RESULT_BACKEND_URL"])
def test_a_broker_that_lacks_what_trueup_needs_is_refused_with_the_reason(
    setting: str, url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"TRUEUP_{setting}", url)
    with pytest.raises(SettingsError, match=message):
        read_settings()


def test_sentinels_need_the_name_of_their_master_and_a_beat_without_redbeat() -> None:
    url = "sentinel://127.0.0.1:26379;sentinel://127.0.0.1:26380"
    with pytest.raises(SettingsError, match="TRUEUP_SENTINEL_MASTER is not set"):
        celery_config(Settings(broker_url=url))
    with pytest.raises(SettingsError, match="redbeat can't follow Sentinels"):
        celery_config(Settings(broker_url=url, sentinel_master="books", beat_scheduler="redbeat"))
    config = client_config(Settings(broker_url=url, sentinel_master="books"))
    assert config["broker_transport_options"]["master_name"] == "books"
    assert config["result_backend_transport_options"]["master_name"] == "books"


def test_doctor_reports_a_node_of_a_cluster_and_a_redis_that_evicts_tasks() -> None:
    with running_redis("cluster-enabled yes") as server, server.client() as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        found = [(finding.level, finding.what) for finding in check_server(client)]
        assert any(level == "error" and "Redis Cluster" in message for level, message in found)
    with running_redis("maxmemory 5mb\nmaxmemory-policy allkeys-lru") as server, server.client() as client:
        found = [(finding.level, finding.what) for finding in check_server(client)]
        assert any(level == "error" and "maxmemory-policy is allkeys-lru" in message for level, message in found)
    with running_redis() as server, server.client() as client:
        assert not [finding for finding in check_server(client) if finding.level == "error"]
