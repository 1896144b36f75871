"""Health endpoints answer truthfully, and frequent requests do not overload the process."""

import threading
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import MakeClient
from tests.support.api import OPERATOR, Clock, bearer
from tests.support.drift_history import add_run
from tests.support.host import Host
from tests.support.sessions import in_background
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import running_worker
from trueup.database.engine import connect, dispose_engine
from trueup.gate.holds import open_hold


def exposition(client: TestClient) -> httpx.Response:
    return client.get("/metrics", headers=bearer(None, sub="prometheus", scope=OPERATOR))


def figures(client: TestClient) -> dict[str, float]:
    """Return the values that Prometheus would read, by name and labels."""
    answer = exposition(client)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_a_process_is_alive_while_its_servers_are_down(
    client_with: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://user:secret@127.0.0.1:1/gone")
    monkeypatch.setenv("TRUEUP_BROKER_URL", "redis://127.0.0.1:1/0")
    client = client_with()
    dispose_engine()
    assert client.get("/healthz").json() == {"status": "ok"}
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        503,
        {"ready": False, "database": "unavailable", "broker": "unavailable", "worker": "unseen"},
    )
    assert "trueup_database_up 0.0" in exposition(client).text


def test_a_database_without_trueup_is_not_ready(client_with: MakeClient, empty_database: str) -> None:
    answer = client_with().get("/readyz")
    assert (answer.status_code, answer.json()["database"]) == (503, "not_installed")


def test_the_api_is_ready_once_a_worker_is_seen(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("trueup.api.views.health.monotonic", clock)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        503,
        {"ready": False, "database": "ok", "broker": "ok", "worker": "unseen"},
    )
    with running_worker(tmp_path / "worker.log", concurrency=1):
        assert client.get("/readyz").json()["worker"] == "unseen"  # answered from the last check

        def is_ready() -> bool:
            clock.go_on(11)
            return client.get("/readyz").status_code == 200

        wait_for(is_ready, "the worker is seen")
    # The worker has answered recently, so its restart does not make the API unready.
    clock.go_on(11)
    assert client.get("/readyz").status_code == 200
    clock.go_on(60)
    assert client.get("/readyz").json()["worker"] == "unseen"


def test_a_request_during_a_check_is_answered_from_the_last_check(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(connection: object) -> None:
        checking.set()
        assert go_on.wait(DEADLINE_SECONDS)

    checking, go_on, clock = threading.Event(), threading.Event(), Clock()
    monkeypatch.setattr("trueup.api.views.health.monotonic", clock)
    assert client.get("/readyz").json()["database"] == "ok"
    clock.go_on(3)
    monkeypatch.setattr("trueup.api.views.health.check_installed", slow)
    with in_background() as submit:
        first = submit(client.get, "/readyz")
        try:
            assert checking.wait(DEADLINE_SECONDS)
            assert client.get("/readyz").json()["database"] == "ok"
            assert not first.done()
            clock.go_on(20)
            late = submit(client.get, "/readyz")
        finally:
            go_on.set()
        assert late.result().json() == first.result().json()


def test_requests_are_counted_by_route_and_not_by_address(client: TestClient, host: Host) -> None:
    user = host.subscriber()
    for path in ("/api/accounts/profile", "/api/accounts/profile", "/api/drift/runs/7", "/api/drift/runs/8"):
        client.get(path, headers=bearer(user))
    client.get("/etc/passwd")
    client.request("BREW", "/healthz")
    seen = figures(client)
    name = "trueup_http_requests_total"
    assert seen[f'{name}{{method="GET",route="/api/accounts/profile",status="200"}}'] == 2
    assert seen[f'{name}{{method="GET",route="/api/drift/runs/{{run_id}}",status="403"}}'] == 2
    assert seen[f'{name}{{method="GET",route="none",status="404"}}'] == 1
    assert seen['trueup_http_request_seconds_count{route="/api/accounts/profile"}'] == 2
    assert seen["trueup_http_requests_in_flight"] == 1  # this one
    assert not any("passwd" in series or "BREW" in series or "runs/7" in series for series in seen)


def test_metrics_show_holds_and_the_last_reconcile_run(client: TestClient, host: Host) -> None:
    before = figures(client)
    assert before["trueup_database_up"] == 1
    assert before["trueup_tokens_held"] == 0
    assert "trueup_last_reconcile_age_seconds" not in before
    with connect() as connection:
        for user in (host.subscriber(), host.subscriber()):
            open_hold(
                connection,
                user_id=user,
                task_id=f"task-{user}",
                feature_name="Test",
                section="chat",
                estimated_tokens=700,
                owner="test",
                lease_seconds=60,
                ttl_seconds=600,
            )
    run = add_run(host, in_review=3, tokens_overstated=55)
    add_run(host, only_user="1", in_review=9)
    host.execute("UPDATE trueup.reconcile_run SET finished_at = now() - interval '1 hour' WHERE id = :id", id=run)
    seen = figures(client)
    assert (seen["trueup_holds_open"], seen["trueup_tokens_held"]) == (2, 1400)
    assert seen["trueup_unrecorded_calls"] == 0
    assert (seen["trueup_last_reconcile_in_review"], seen["trueup_last_reconcile_tokens_overstated"]) == (3, 55)
    assert 3600 <= seen["trueup_last_reconcile_age_seconds"] < 3700
    assert "trueup_last_deep_reconcile_age_seconds" not in seen


def test_metrics_are_for_operators_unless_they_are_made_public(client_with: MakeClient, host: Host) -> None:
    user = host.subscriber()
    client = client_with()
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=bearer(user)).status_code == 403
    assert client_with(public_metrics=True).get("/metrics").status_code == 200
