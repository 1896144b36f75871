"""Error answers have one shape, and show nothing that the client may not know."""

import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Body, Request
from fastapi.testclient import TestClient
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import text

from tests.api.conftest import MakeClient
from tests.support.api import OPERATOR, bearer
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from trueup.api.access import require_tokens
from trueup.api.auth import CurrentUser
from trueup.api.middleware import SECURITY_HEADERS
from trueup.api.schemas import Body as Model
from trueup.database.engine import connect, dispose_engine
from trueup.gate.decision import check_access
from trueup.gate.denial import denial_payload
from trueup.settings.settings import get_settings

PROFILE = "/api/accounts/profile"
SECRETS = ("Traceback", "psycopg", "sqlalchemy", "postgresql://", "redis://", "/run/", "SELECT")


def problem(answer: httpx.Response, status: int, code: str) -> str:
    """Check that an error answer has the common shape, and return its text."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"success", "error", "error_code"}
    assert (answer.json()["success"], answer.json()["error_code"]) == (False, code)
    assert answer.headers["content-type"] == "application/json"
    for name, value in SECURITY_HEADERS:
        assert answer.headers[name] == value
    assert not any(secret in answer.text for secret in SECRETS)
    message: str = answer.json()["error"]
    return message


class Order(Model):
    """A body for these tests."""

    number: int
    note: str = ""


@pytest.fixture
def shop(client_with: MakeClient) -> TestClient:
    """An API with three more routes, for a body, the gate and a crash."""
    return with_routes(client_with(max_body_bytes=2048))


def with_routes(client: TestClient) -> TestClient:
    app: Any = client.app

    @app.post("/order")
    def order(order: Order) -> Order:
        return order

    @app.post("/gated")
    def gated(request: Request, user_id: CurrentUser, estimate: Annotated[int, Body(embed=True)]) -> str:
        require_tokens(request, user_id, estimate, "Test")
        return "admitted"

    @app.get("/crash")
    def crash() -> None:
        raise RuntimeError("postgresql://user:secret@db SELECT")

    return client


def test_a_denial_is_402_with_exactly_the_specifications_body(shop: TestClient, host: Host) -> None:
    user = host.subscriber(1000)
    host.log(user, 400)
    ask = {"headers": bearer(user)}
    assert shop.post("/gated", json={"estimate": 600}, **ask).json() == "admitted"
    denied = shop.post("/gated", json={"estimate": 601}, **ask)
    with connect() as connection:
        access = check_access(connection, user, 601, "Test")
    assert (denied.status_code, denied.json()) == (402, denial_payload(access))
    assert denied.json() == {
        "success": False,
        "error": "Insufficient tokens for Test: 601 needed, 600 available",
        "error_code": "insufficient_tokens",
        "tokens_remaining": 600,
        "original_tokens": 1000,
        "consumed_tokens": 400,
        "days_remaining": None,
    }
    figures = shop.get("/metrics", headers=bearer(user, scope=OPERATOR)).text
    assert 'trueup_decisions_total{outcome="insufficient_tokens"} 1.0' in figures
    assert 'trueup_decisions_total{outcome="allowed"} 1.0' in figures


def test_unknown_addresses_and_methods_have_the_same_shape(client: TestClient) -> None:
    problem(client.get("/api/nothing"), 404, "not_found")
    problem(client.get("/redoc"), 404, "not_found")
    answer = client.delete(PROFILE)
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"number": "x"}, "number: "),
        ({}, "number: "),
        ({"number": 1, "nmuber": 2}, "nmuber: unknown field"),
        ([], "body: "),
        (None, "body: "),
    ],
    ids=str,
)
def test_wrong_input_is_422_and_names_the_field(shop: TestClient, body: object, named: str) -> None:
    assert named in problem(shop.post("/order", json=body), 422, "invalid_input")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"number": 1', b"number=1", b"[" * 2000, b'{"a":"\\ud800"}'])
def test_a_body_that_is_not_json_is_422(shop: TestClient, content: bytes) -> None:
    answer = shop.post("/order", content=content, headers={"Content-Type": "application/json"})
    problem(answer, 422, "invalid_input")


def test_an_error_never_repeats_the_wrong_value(shop: TestClient) -> None:
    assert "hunter2" not in shop.post("/order", json={"number": "hunter2", "note": 5}).text


def test_a_body_above_the_limit_is_413_by_its_declared_or_real_size(shop: TestClient) -> None:
    large = b'{"number": 1, "note": "' + b"x" * 4000 + b'"}'
    headers = {"Content-Type": "application/json"}
    said = problem(shop.post("/order", content=large, headers=headers), 413, "body_too_large")
    assert "2048" in said

    def parts() -> Iterator[bytes]:
        yield from (large[i : i + 100] for i in range(0, len(large), 100))

    problem(shop.post("/order", content=parts(), headers=headers), 413, "body_too_large")
    assert shop.post("/order", json={"number": 1}).json() == {"number": 1, "note": ""}


def test_a_crash_is_logged_under_a_number_and_the_answer_has_only_the_number(
    shop: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    message = problem(shop.get("/crash"), 500, "internal_error")
    number = message.rsplit(" ", 1)[1]
    assert f"error={number}" in caplog.text
    assert "RuntimeError" in caplog.text


@pytest.fixture
def no_database(monkeypatch: pytest.MonkeyPatch, database: str) -> Iterator[None]:
    """Settings with a database address that has no server."""
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://user:secret@127.0.0.1:1/gone")
    get_settings.cache_clear()
    dispose_engine()
    yield
    dispose_engine()


@pytest.mark.parametrize(
    "path",
    [
        *(f"/api/accounts/{view}" for view in ("overview", "profile")),
        *(f"/api/billing/{view}" for view in ("overview", "subscription", "plans")),
        "/api/drift/runs",
        "/api/drift/runs/1",
    ],
)
def test_without_a_database_a_view_is_503_and_never_shows_zeros(
    client_with: MakeClient, no_database: None, path: str
) -> None:
    answer = client_with().get(path, headers=bearer(1, scope=OPERATOR))
    problem(answer, 503, "service_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert "127.0.0.1" not in answer.text


def test_without_a_database_the_gate_admits_no_user(client_with: MakeClient, no_database: None) -> None:
    answer = with_routes(client_with()).post("/gated", json={"estimate": 0}, headers=bearer(1))
    problem(answer, 503, "service_unavailable")


def test_without_a_database_no_task_is_sent_and_none_is_shown(client_with: MakeClient, no_database: None) -> None:
    client, ask = client_with(), {"headers": bearer(1)}
    for answer in (
        client.post("/api/ai/ask-question/", json={"question": "When?"}, **ask),
        client.post("/api/web-knowledge/generate-prompt/", json={"prompt": "Be nice."}, **ask),
        client.get(f"/api/tasks/{uuid.uuid4()}", **ask),
    ):
        assert "Nothing was spent by this request" in problem(answer, 503, "service_unavailable")


def test_a_database_without_trueup_is_503(client_with: MakeClient, empty_database: str) -> None:
    answer = client_with().get(PROFILE, headers=bearer(1))
    problem(answer, 503, "not_ready")


def test_without_a_free_connection_a_request_waits_and_is_then_503(
    client_with: MakeClient, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_POOL_SIZE", "2")
    monkeypatch.setenv("TRUEUP_DATABASE_CONNECT_TIMEOUT_SECONDS", "1")
    user, client = host.subscriber(), client_with()
    dispose_engine()
    with connect() as one, connect() as two:
        one.execute(text("SELECT 1")), two.execute(text("SELECT 1"))
        problem(client.get(PROFILE, headers=bearer(user)), 503, "service_unavailable")
    assert client.get(PROFILE, headers=bearer(user)).status_code == 200


def test_requests_above_the_concurrency_limit_are_refused_at_once(client_with: MakeClient, host: Host) -> None:
    client = client_with(max_requests=2)
    at_work, go_on = threading.Semaphore(0), threading.Event()

    @client.app.get("/slow")  # type: ignore[attr-defined]
    def slow() -> str:
        at_work.release()
        assert go_on.wait(DEADLINE_SECONDS)
        return "done"

    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(client.get("/slow"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert all(at_work.acquire(timeout=DEADLINE_SECONDS) for _ in threads)
        refused = client.get("/healthz")
        problem(refused, 503, "service_unavailable")
        assert "retry-after" in refused.headers
    finally:
        go_on.set()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
    assert [answer.json() for answer in answers] == ["done"] * 2
    assert client.get("/healthz").status_code == 200


def test_the_rate_limit_of_one_user_does_not_affect_others(client_with: MakeClient, host: Host) -> None:
    one, other = host.subscriber(), host.subscriber()
    client = client_with(rate_limit_per_minute=3)
    # All processes share the count in Redis. The second client stands for another process.
    second = client_with(rate_limit_per_minute=3)
    headers = {one: bearer(f"00{one}"), other: bearer(other)}
    unique = f"limited-{host.value('SELECT current_database()')}"
    for app in (client.app, second.app):
        app.state.rate_limit._item.namespace = unique  # type: ignore[attr-defined]
    assert [c.get(PROFILE, headers=headers[one]).status_code for c in (client, second, client)] == [200] * 3
    refused = second.get(PROFILE, headers=headers[one])
    problem(refused, 429, "too_many_requests")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert client.get(PROFILE, headers=headers[other]).status_code == 200


def test_a_machine_named_like_a_user_id_has_its_own_rate_limit(client_with: MakeClient, host: Host) -> None:
    client, user = client_with(rate_limit_per_minute=2), host.subscriber()
    unique = f"machines-{host.value('SELECT current_database()')}"
    client.app.state.rate_limit._item.namespace = unique  # type: ignore[attr-defined]
    machine = bearer(None, sub=str(user), scope="trueup:operator")
    assert [client.get("/metrics", headers=machine).status_code for _ in range(3)] == [200, 200, 429]
    assert client.get(PROFILE, headers=bearer(user)).status_code == 200


def test_a_failure_of_redis_between_count_and_answer_is_no_crash(
    client_with: MakeClient, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_arguments: object) -> None:
        raise RedisConnectionError

    client, user = client_with(rate_limit_per_minute=1), host.subscriber()
    client.app.state.rate_limit._item.namespace = f"gone-{host.value('SELECT current_database()')}"  # type: ignore[attr-defined]
    assert client.get(PROFILE, headers=bearer(user)).status_code == 200
    monkeypatch.setattr("limits.strategies.SlidingWindowCounterRateLimiter.get_window_stats", gone)
    problem(client.get(PROFILE, headers=bearer(user)), 429, "too_many_requests")


def test_without_redis_the_limit_is_kept_in_memory(
    client_with: MakeClient, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRUEUP_BROKER_URL", "redis://:hunter2@127.0.0.1:1/0")
    client, user = client_with(rate_limit_per_minute=2), host.subscriber()
    with caplog.at_level(logging.WARNING):
        statuses = [client.get(PROFILE, headers=bearer(user)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert caplog.text.count("counted in this process") == 1
    assert "hunter2" not in caplog.text


def test_a_rate_limit_of_zero_means_no_limit(client_with: MakeClient, host: Host) -> None:
    client, user = client_with(rate_limit_per_minute=0), host.subscriber()
    assert [client.get(PROFILE, headers=bearer(user)).status_code for _ in range(5)] == [200] * 5


def test_a_terminated_database_session_is_replaced_without_an_error(client: TestClient, host: Host) -> None:
    user = host.subscriber()
    assert client.get(PROFILE, headers=bearer(user)).status_code == 200
    host.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trueup'")
    wait_for(
        lambda: host.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trueup'") == 0,
        "the sessions are gone",
    )
    assert client.get(PROFILE, headers=bearer(user)).status_code == 200
