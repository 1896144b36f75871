"""AI features over HTTP: a gate check before sending, one task per idempotency key, each task for its owner only."""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from httpx import Response

from tests.support.api import SECRET, bearer
from tests.support.host import Host
from tests.support.sessions import in_background, run_at_once
from tests.support.waiting import wait_for
from tests.support.worker import WorkerProcess
from tests.worker.conftest import app, shared_database, shared_host, worker
from trueup.api.app import create_app
from trueup.errors import (
    AnswerFormatError,
    DenialPayload,
    HoldExhaustedError,
    InvalidInputError,
    ProviderError,
    ServiceUnavailableError,
    SettingsError,
    TokensDenied,
)
from trueup.settings.settings import get_settings
from trueup.worker.config import client_config

__all__ = ["app", "shared_database", "shared_host", "worker"]

ASK, ENHANCE = "/api/ai/ask-question/", "/api/web-knowledge/generate-prompt/"
QUESTION = {"question": "Are returns free?", "context": ["Returns are free for 45 days."]}
BODIES: dict[str, dict[str, Any]] = {ASK: QUESTION, ENHANCE: {"prompt": "Be nice. Tell the price."}}
ANSWER = {
    "answer": "Yes.",
    "answered": True,
    "passages_used": [0],
    "passages_left_out": 0,
    "passage_cut": None,
    "language": "en",
    "warnings": [],
}
DENIAL = DenialPayload(
    success=False,
    error="No tokens remaining in subscription",
    error_code="no_tokens_remaining",
    tokens_remaining=0,
    original_tokens=10,
    consumed_tokens=10,
    days_remaining=None,
)

Messages = Callable[[], list[dict[str, Any]]]
MakeClient = Callable[..., TestClient]


@pytest.fixture
def client_with(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeClient]:
    """A client of the API with these settings and, if given, another Celery application."""

    def make(celery: Celery = app, **settings: object) -> TestClient:
        for name, value in ({"jwt_secret": SECRET} | settings).items():
            monkeypatch.setenv(f"TRUEUP_API__{name.upper()}", str(value))
        get_settings.cache_clear()
        return TestClient(create_app(celery))

    yield make
    monkeypatch.undo()
    get_settings.cache_clear()


@pytest.fixture
def client(client_with: MakeClient) -> TestClient:
    return client_with()


@pytest.fixture
def queued(app: Celery) -> Iterator[Messages]:
    """Give a function that takes the queued messages; no worker may run."""
    app.control.purge()

    def take() -> Iterator[dict[str, Any]]:
        with app.connection_for_read() as connection:
            while message := connection.default_channel.basic_get("trueup-ai", no_ack=True):
                yield {"task": message.headers["task"], "id": message.headers["id"], **message.payload[1]}

    yield lambda: list(take())
    app.control.purge()


def post(
    client: TestClient, user: object, path: str = ASK, body: Any = None, *, key: str | None = None, **headers: str
) -> Response:
    headers = {**bearer(user), **headers} | ({"Idempotency-Key": key} if key else {})
    return client.post(path, json=BODIES[path] if body is None else body, headers=headers)


def get(client: TestClient, user: object, task_id: str) -> Response:
    return client.get(f"/api/tasks/{task_id}", headers=bearer(user))


def rows(host: Host, user: int) -> list[Any]:
    return list(host.execute("SELECT * FROM trueup.task_request WHERE user_id = :user", user=user).all())


class TestWithoutAWorker:
    """The messages that requests send, and the state that the API shows."""

    @pytest.mark.parametrize(("path", "task"), [(ASK, "trueup.ask_question"), (ENHANCE, "trueup.generate_prompt")])
    def test_a_request_is_answered_at_once_with_the_address_of_its_task(
        self, client: TestClient, shared_host: Host, queued: Messages, path: str, task: str
    ) -> None:
        user = shared_host.subscriber()
        answer = post(client, user, path)
        assert answer.status_code == 202
        body = answer.json()
        assert (body["state"], body["task"], body["result"]) == ("pending", task, None)
        assert answer.headers["Location"] == f"/api/tasks/{body['task_id']}"
        assert answer.headers["Retry-After"] == "1"
        [message] = queued()
        assert (message["task"], message["id"], message["user_id"]) == (task, body["task_id"], user)
        assert {name: message[name] for name in BODIES[path]} == BODIES[path]
        assert get(client, user, body["task_id"]).json() == body

    @pytest.mark.parametrize("path", BODIES)
    def test_a_user_without_tokens_is_denied_before_anything_is_sent(
        self, client: TestClient, shared_host: Host, queued: Messages, path: str
    ) -> None:
        user = shared_host.subscriber(100)
        shared_host.log(user, 100)
        answer = post(client, user, path, key="key")
        assert answer.status_code == 402
        assert answer.json() == {
            "success": False,
            "error": "No tokens remaining in subscription",
            "error_code": "no_tokens_remaining",
            "tokens_remaining": 0,
            "original_tokens": 100,
            "consumed_tokens": 100,
            "days_remaining": None,
        }
        assert (queued(), rows(shared_host, user)) == ([], [])

    @pytest.mark.parametrize(("path", "estimate"), [(ASK, 1500), (ENHANCE, 700)])
    def test_the_gate_check_uses_the_specifications_estimate(
        self, client: TestClient, shared_host: Host, queued: Messages, path: str, estimate: int
    ) -> None:
        assert post(client, shared_host.subscriber(estimate), path).status_code == 202
        denied = post(client, shared_host.subscriber(estimate - 1), path)
        assert (denied.status_code, denied.json()["error_code"]) == (402, "insufficient_tokens")

    def test_the_same_key_is_the_same_task(self, client: TestClient, shared_host: Host, queued: Messages) -> None:
        user = shared_host.subscriber()
        first, second = (post(client, user, key="key-1").json() for _ in range(2))
        other = post(client, user, key="key-2").json()
        keyless = [post(client, user).json() for _ in range(2)]
        assert first == second
        sent = [first["task_id"], other["task_id"], *(answer["task_id"] for answer in keyless)]
        assert [message["id"] for message in queued()] == sent
        assert len(set(sent)) == 4

    def test_a_repeated_key_is_answered_after_the_tokens_are_spent(
        self, client: TestClient, shared_host: Host, queued: Messages
    ) -> None:
        user = shared_host.subscriber(1500)
        first = post(client, user, key="key").json()
        shared_host.log(user, 1500)
        assert post(client, user, key="key").json() == first
        assert post(client, user, key="another").status_code == 402

    @pytest.mark.parametrize(
        ("path", "body"), [(ASK, {"question": "Other?"}), (ASK, {**QUESTION, "context": []}), (ENHANCE, None)]
    )
    def test_a_key_with_another_request_is_refused(
        self, client: TestClient, shared_host: Host, queued: Messages, path: str, body: Any
    ) -> None:
        user = shared_host.subscriber()
        post(client, user, key="key")
        answer = post(client, user, path, body, key="key")
        assert (answer.status_code, answer.json()["error_code"]) == (409, "conflict")
        assert "Idempotency-Key" in answer.json()["error"]
        assert len(queued()) == 1

    def test_two_users_with_the_same_key_have_separate_tasks_and_see_only_their_own(
        self, client: TestClient, shared_host: Host, queued: Messages
    ) -> None:
        mine, yours = shared_host.subscriber(), shared_host.subscriber()
        tasks = {user: post(client, user, key="key").json()["task_id"] for user in (mine, yours)}
        assert len(set(tasks.values())) == 2
        assert get(client, mine, tasks[mine]).status_code == 200
        answer = get(client, mine, tasks[yours])
        assert (answer.status_code, answer.json()["error_code"]) == (404, "not_found")
        assert get(client, mine, str(uuid.uuid4())).status_code == 404

    def test_a_failed_send_is_repeated_with_the_same_task(
        self, client_with: MakeClient, shared_host: Host, queued: Messages
    ) -> None:
        user = shared_host.subscriber()
        cut_off = Celery("cut-off", set_as_current=False)
        cut_off.conf.update(client_config(get_settings()) | {"broker_url": "redis://127.0.0.1:1/0"})
        failed = post(client_with(cut_off), user, key="key")
        assert (failed.status_code, failed.json()["error_code"]) == (503, "service_unavailable")
        assert failed.headers["Retry-After"]
        assert "it is not known whether the task was sent" in failed.json()["error"]
        [row] = rows(shared_host, user)
        assert row.sent_at is None
        client = client_with()
        assert post(client, user, key="key").json()["task_id"] == row.task_id
        assert [message["id"] for message in queued()] == [row.task_id]
        assert rows(shared_host, user)[0].sent_at is not None

    def test_a_sent_task_is_answered_202_even_if_the_send_could_not_be_recorded(
        self, client: TestClient, shared_host: Host, queued: Messages
    ) -> None:
        shared_host.execute(
            "CREATE FUNCTION busy() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE lock_not_available; END'; "
            "CREATE TRIGGER busy BEFORE UPDATE OF sent_at ON trueup.task_request EXECUTE FUNCTION busy()"
        )
        try:
            answer = post(client, shared_host.subscriber())
        finally:
            shared_host.execute("DROP FUNCTION busy CASCADE")
        assert answer.status_code == 202, answer.text
        assert [message["id"] for message in queued()] == [answer.json()["task_id"]]

    @pytest.mark.parametrize(
        ("path", "body", "field"),
        [
            (ASK, {}, "question"),
            (ASK, {"question": ""}, "question"),
            (ASK, {"question": "x" * 4001}, "question"),
            (ASK, {"question": "🧿" * 2000}, "question"),
            (ASK, {"question": "\x00\x01"}, "question"),
            (ASK, {"question": "When?", "context": "x"}, "context"),
            (ASK, {"question": "When?", "context": ["x"] * 101}, "context"),
            (ASK, {"question": "When?", "contxt": []}, "contxt"),
            (ENHANCE, {"prompt": 5}, "prompt"),
            (ENHANCE, {"prompt": "Be nice.", "business": {"nam": "x"}}, "business.nam"),
            (ENHANCE, {"prompt": "Be nice.", "user_id": 1}, "user_id"),
        ],
    )
    def test_wrong_input_is_refused_with_the_fields_name_and_nothing_is_sent(
        self, client: TestClient, shared_host: Host, queued: Messages, path: str, body: Any, field: str
    ) -> None:
        user = shared_host.subscriber()
        answer = post(client, user, path, body)
        assert (answer.status_code, answer.json()["error_code"]) == (422, "invalid_input")
        assert field in answer.json()["error"]
        assert (queued(), rows(shared_host, user)) == ([], [])

    @pytest.mark.parametrize("path", [ASK, ENHANCE])
    def test_a_server_without_the_features_says_so_and_sends_nothing(
        self, client: TestClient, shared_host: Host, queued: Messages, monkeypatch: pytest.MonkeyPatch, path: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "extruct", None)  # it can't be imported any more
        user = shared_host.subscriber()
        answer = post(client, user, path, BODIES[path])
        assert (answer.status_code, answer.json()["error_code"]) == (501, "not_installed")
        assert (queued(), rows(shared_host, user)) == ([], [])

    @pytest.mark.parametrize("key", ["two words", "x" * 256, "ключ".encode()])
    def test_a_malformed_key_is_refused(
        self, client: TestClient, shared_host: Host, queued: Messages, key: Any
    ) -> None:
        headers = {**bearer(shared_host.subscriber()), "Idempotency-Key": key}
        answer = client.post(ASK, json=QUESTION, headers=headers)
        assert (answer.status_code, answer.json()["error_code"]) == (422, "invalid_input")
        assert "Idempotency-Key" in answer.json()["error"]

    def test_a_request_without_a_token_is_refused(self, client: TestClient) -> None:
        assert client.post(ASK, json=QUESTION).status_code == 401
        assert client.get(f"/api/tasks/{uuid.uuid4()}").status_code == 401

    def test_a_request_is_forgotten_after_a_day(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery
    ) -> None:
        user = shared_host.subscriber()
        old = post(client, user, key="key").json()["task_id"]
        shared_host.execute("UPDATE trueup.task_request SET created_at = created_at - interval '25 hours'")
        assert get(client, user, old).status_code == 404
        assert app.tasks["trueup.prune_requests"].apply().get() > 0
        assert rows(shared_host, user) == []
        assert post(client, user, key="key").json()["task_id"] != old

    def test_sending_a_task_leaves_no_result_subscription_behind(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery
    ) -> None:
        task_id = post(client, shared_host.subscriber()).json()["task_id"]
        with app.connection_for_read() as connection:
            channels = connection.default_channel.client.pubsub_channels()
        assert [channel for channel in channels if task_id.encode() in channel] == []


@contextmanager
def ended(app: Celery, task_id: str, result: Any, state: str) -> Iterator[None]:
    """Store a task's result as a worker does."""
    app.backend.store_result(task_id, result, state)
    yield
    app.backend.forget(task_id)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # by Celery, as a worker would
class TestHowATaskStands:
    """The API's states for Celery's states."""

    def send(self, client: TestClient, host: Host) -> tuple[int, str]:
        user = host.subscriber()
        return user, post(client, user, key="key").json()["task_id"]

    @pytest.mark.parametrize(
        ("celery_state", "state"),
        [("STARTED", "running"), ("RETRY", "running"), ("RECEIVED", "running"), ("REVOKED", "failed")],
    )
    def test_a_task_that_has_not_ended_is_running_and_a_revoked_one_has_failed(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery, celery_state: str, state: str
    ) -> None:
        user, task_id = self.send(client, shared_host)
        error = ServiceUnavailableError("PostgreSQL", "db.internal:5432", "away")
        with ended(app, task_id, error if celery_state == "RETRY" else None, celery_state):
            answer = get(client, user, task_id)
        assert answer.json()["state"] == state
        assert "db.internal" not in answer.text

    def test_a_result_is_shown_and_a_repeated_key_is_answered_with_it(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery
    ) -> None:
        user, task_id = self.send(client, shared_host)
        with ended(app, task_id, ANSWER, "SUCCESS"):
            shown = get(client, user, task_id).json()
            repeated = post(client, user, key="key")
        assert (shown["state"], shown["result"]) == ("done", ANSWER)
        assert (repeated.status_code, repeated.json()) == (200, shown)

    def test_a_repeated_key_gets_its_result_even_if_the_send_was_not_recorded_and_the_tokens_are_spent(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery
    ) -> None:
        user = shared_host.subscriber(1500)
        task_id = post(client, user, key="key").json()["task_id"]
        shared_host.execute("UPDATE trueup.task_request SET sent_at = NULL WHERE user_id = :user", user=user)
        shared_host.log(user, 1500)
        with ended(app, task_id, ANSWER, "SUCCESS"):
            repeated = post(client, user, key="key")
        assert (repeated.status_code, repeated.json().get("result")) == (200, ANSWER)

    def test_a_task_that_the_gate_denied_is_402_with_its_body(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery
    ) -> None:
        user, task_id = self.send(client, shared_host)
        with ended(app, task_id, TokensDenied(DENIAL), "FAILURE"):
            shown = get(client, user, task_id)
            repeated = post(client, user, key="key", Prefer="wait=20")
        assert (shown.status_code, shown.json()["state"], shown.json()["denial"]) == (200, "denied", DENIAL)
        assert (repeated.status_code, repeated.json()) == (402, DENIAL)

    @pytest.mark.parametrize(
        ("error", "code", "shown_text"),
        [
            (InvalidInputError("question has 0 characters"), "invalid_input", "question has 0"),
            (AnswerFormatError("secret"), "unusable_answer", "charged"),
            (ProviderError("secret"), "provider_failed", "provider"),
            (HoldExhaustedError("secret"), "tokens_exhausted", "tokens"),
            (SettingsError("secret"), "not_configured", "lacks a setting"),
            (ServiceUnavailableError("PostgreSQL", "secret", "secret"), "task_failed", "log"),
            (RuntimeError("secret"), "task_failed", "log"),
        ],
    )
    def test_a_failure_is_shown_without_the_details_that_belong_in_the_log(
        self,
        client: TestClient,
        shared_host: Host,
        queued: Messages,
        app: Celery,
        error: Exception,
        code: str,
        shown_text: str,
    ) -> None:
        user, task_id = self.send(client, shared_host)
        with ended(app, task_id, error, "FAILURE"):
            shown = get(client, user, task_id)
            waited = post(client, user, key="key", Prefer="wait=20")
        assert shown.json()["state"] == "failed"
        assert shown.json()["failure"]["error_code"] == waited.json()["error_code"] == code
        assert (waited.status_code, waited.json()["success"]) == (502, False)
        for answer in (shown, waited):
            assert shown_text in answer.text
            assert "secret" not in answer.text

    def test_a_waiting_request_is_answered_when_the_task_ends(
        self, client: TestClient, shared_host: Host, queued: Messages, app: Celery
    ) -> None:
        user = shared_host.subscriber()
        with in_background() as submit:
            waiting = submit(post, client, user, key="key", Prefer="respond-async, wait=20")
            [message] = wait_for(queued, "the task is sent")
            with ended(app, message["id"], ANSWER, "SUCCESS"):
                answer = waiting.result()
        assert (answer.status_code, answer.json()["result"]) == (200, ANSWER)
        assert answer.headers["Preference-Applied"] == "wait=20"

    @pytest.mark.parametrize(
        ("prefer", "applied"),
        [("wait=0", "wait=0"), ("wait=3", "wait=0"), ('foo; wait="3"', "wait=0"), ("wait=x", None), ("", None)],
    )
    def test_a_request_waits_no_longer_than_the_settings_allow(
        self, client_with: MakeClient, shared_host: Host, queued: Messages, prefer: str, applied: str | None
    ) -> None:
        client = client_with(max_wait_seconds=0)
        answer = post(client, shared_host.subscriber(), Prefer=prefer)
        assert answer.status_code == 202
        assert answer.headers.get("Preference-Applied") == applied

    def test_an_unreachable_result_backend_is_503(
        self, client_with: MakeClient, shared_host: Host, queued: Messages
    ) -> None:
        user, task_id = self.send(client_with(), shared_host)
        with Celery("cut-off", set_as_current=False) as cut_off:
            cut_off.conf.update(client_config(get_settings()) | {"result_backend": "redis://127.0.0.1:1/0"})
            client = client_with(cut_off)
            answer = get(client, user, task_id)
            # The task was sent: an error would make the client send it again.
            sent = post(client, user, Prefer="wait=1")
        assert (answer.status_code, answer.json()["error_code"]) == (503, "service_unavailable")
        assert (sent.status_code, sent.json()["state"]) == (202, "pending")
        assert sent.json()["task_id"] in [message["id"] for message in queued()]


class TestWithAWorker:
    """A real worker runs the task, and its usage is charged."""

    @pytest.mark.parametrize(("path", "part"), [(ASK, "answer"), (ENHANCE, "prompt")])
    def test_a_waiting_request_gets_the_result_and_its_tokens_are_charged(
        self, client: TestClient, shared_host: Host, worker: WorkerProcess, path: str, part: str
    ) -> None:
        user = shared_host.subscriber()
        answer = post(client, user, path, Prefer="wait=20")
        assert answer.status_code == 200, answer.text
        assert answer.json()["result"][part]
        assert shared_host.used(user) > 0
        assert json.loads(get(client, user, answer.json()["task_id"]).text) == answer.json()

    def test_concurrent_requests_with_one_key_are_charged_once(
        self, client: TestClient, shared_host: Host, worker: WorkerProcess
    ) -> None:
        user = shared_host.subscriber()
        answers = run_at_once([lambda: post(client, user, key="key", Prefer="wait=20")] * 4)
        # As after a lost `sent_at`: the task is sent a second time, and the gate runs it once.
        shared_host.execute("UPDATE trueup.task_request SET sent_at = NULL WHERE user_id = :user", user=user)
        answers.append(post(client, user, key="key", Prefer="wait=20"))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["task_id"] for answer in answers}) == 1
        wait_for(lambda: shared_host.value("SELECT held = 0 FROM trueup.balance WHERE user_id = :u", u=user), "the end")
        assert shared_host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user) == 1
