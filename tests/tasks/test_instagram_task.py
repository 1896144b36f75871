"""`trueup.send_instagram_dm` with its real outbox sends the message and the public reply at most once each."""

import json
from typing import Any

import pytest
from celery import Celery
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.support.host import Host
from tests.support.worker import own_application
from trueup.features.instagram.graph import GraphError
from trueup.settings.settings import get_settings

ACCOUNT, COMMENT = "17841405822304914", "17870913679156914"
MESSAGES, REPLIES = f"/{ACCOUNT}/messages", f"/{COMMENT}/replies"
TASK = "3f2d7c1e-0000-4000-8000-000000000001"


@pytest.fixture
def app(database: str, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Celery:
    monkeypatch.setenv("TRUEUP_INSTAGRAM_GRAPH_URL", httpserver.url_for("/"))
    monkeypatch.setenv("TRUEUP_INSTAGRAM_ACCESS_TOKEN", "token")
    # A fixed text needs no model.
    monkeypatch.delenv("TRUEUP_MODEL_PROVIDER")
    get_settings.cache_clear()
    return own_application()


def deliver(app: Celery, user: int) -> dict[str, Any]:
    comment = {"id": COMMENT, "text": "How much?", "from": {"id": "1", "username": "nina"}}
    arguments = {
        "event": {"entry": [{"id": ACCOUNT, "changes": [{"field": "comments", "value": comment}]}]},
        "config": {
            "mode": "STATIC",
            "static_message": "See [[CTA:Prices|https://shop.example/prices]] [[CTA:Old|http://shop.example/]]",
            "public_reply_enabled": True,
            "public_reply_text": "See your inbox.",
        },
    }
    task = app.tasks["trueup.send_instagram_dm"]
    result: dict[str, Any] = task.apply(kwargs={"user_id": user, **arguments}, task_id=TASK, retries=3).get()
    return result


def calls(httpserver: HTTPServer) -> list[str]:
    return [request.path for request, _ in httpserver.log]


def effects(host: Host) -> dict[str, str]:
    return {row.effect: row.status for row in host.execute("SELECT effect, status FROM trueup.outbox").all()}


def test_a_redelivered_task_sends_neither_again_and_returns_the_same_result(
    app: Celery, host: Host, httpserver: HTTPServer
) -> None:
    httpserver.expect_request(MESSAGES).respond_with_json({"message_id": "m1"})
    httpserver.expect_request(REPLIES).respond_with_json({"id": "r1"})
    user = host.subscriber()
    first = deliver(app, user)
    assert deliver(app, user) == first
    assert calls(httpserver) == [MESSAGES, REPLIES]
    assert first["buttons"] == [{"title": "Prices", "url": "https://shop.example/prices"}]
    assert "stays text" in first["warnings"][0]
    assert (first["message_id"], first["public_reply_id"]) == ("m1", "r1")


def test_a_failed_reply_is_sent_again_without_the_message(app: Celery, host: Host, httpserver: HTTPServer) -> None:
    httpserver.expect_request(MESSAGES).respond_with_json({"message_id": "m1"})
    httpserver.expect_oneshot_request(REPLIES).respond_with_json({"error": {"message": "No.", "code": 10}}, status=403)
    user = host.subscriber()
    assert not deliver(app, user)["public_reply_sent"]
    assert effects(host) == {"instagram_message": "sent", "instagram_public_reply": "failed"}
    httpserver.expect_oneshot_request(REPLIES).respond_with_json({"id": "r1"})
    assert deliver(app, user)["public_reply_id"] == "r1"
    assert calls(httpserver) == [MESSAGES, REPLIES, REPLIES]


def test_a_reply_that_may_have_been_sent_is_not_sent_again(app: Celery, host: Host, httpserver: HTTPServer) -> None:
    httpserver.expect_request(MESSAGES).respond_with_json({"message_id": "m1"})
    httpserver.expect_request(REPLIES).respond_with_data("gateway", status=504)
    user = host.subscriber()
    for _ in range(2):
        result = deliver(app, user)
        assert (result["status"], result["public_reply_sent"]) == ("sent", False)
    assert calls(httpserver) == [MESSAGES, REPLIES]
    assert effects(host) == {"instagram_message": "sent", "instagram_public_reply": "unknown"}


def test_a_failed_message_sends_no_public_reply(app: Celery, host: Host, httpserver: HTTPServer) -> None:
    httpserver.expect_request(MESSAGES).respond_with_handler(lambda _: Response(json.dumps({"error": {}}), 400))
    with pytest.raises(GraphError):
        deliver(app, host.subscriber())
    assert calls(httpserver) == [MESSAGES]
    assert effects(host) == {"instagram_message": "failed"}
