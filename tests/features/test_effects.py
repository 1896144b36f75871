import re
from collections.abc import Iterator
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from pytest_httpserver import HTTPServer
from sqlalchemy import Connection
from werkzeug import Request, Response

from tests.features.test_instagram import _event, _static
from tests.support.host import Host
from trueup.features.instagram.comments import action_config
from trueup.features.instagram.direct_message import DmResult, send_instagram_dm
from trueup.features.instagram.effects import Outbox
from trueup.features.instagram.graph import GraphClient, GraphError
from trueup.usage.outbox import begin_effect, list_unresolved_effects

TASK = "task-1"


@pytest.fixture
def graph(httpserver: HTTPServer) -> Iterator[GraphClient]:
    with GraphClient(base_url=httpserver.url_for(""), access_token="secret", timeout_seconds=0.5) as client:
        yield client


def outbox(user: int, *, resend_unknown: bool = False) -> Outbox:
    return Outbox(user_id=user, task_id=TASK, resend_unknown=resend_unknown)


def send(user: int, graph: GraphClient, *, config: Any = None, resend_unknown: bool = False) -> DmResult:
    return send_instagram_dm(
        None,
        event=_event(),
        config=config or _static(),
        graph=graph,
        outbox=outbox(user, resend_unknown=resend_unknown),
    )


def answer_with(httpserver: HTTPServer, *statuses: int) -> list[str]:
    """Answer requests with these statuses in turn, then always with the last. Returns the list of requested paths."""
    asked: list[str] = []

    def handler(request: Request) -> Response:
        asked.append(request.path)
        status = statuses[min(len(asked), len(statuses)) - 1]
        body = '{"message_id": "m1", "id": "r1"}' if status == 200 else '{"error": {"message": "no", "code": 2}}'
        return Response(body, status=status, content_type="application/json")

    for path in ("messages", "replies"):
        httpserver.expect_request(re.compile(f".*/{path}$"), method="POST").respond_with_handler(handler)
    return asked


def test_a_redelivered_task_sends_no_second_message(host: Host, httpserver: HTTPServer, graph: GraphClient) -> None:
    user, asked = host.user(), answer_with(httpserver, 200)
    first = send(user, graph)
    again = send(user, graph)
    assert first == again
    assert (first.status, first.message_id) == ("sent", "m1")
    assert len(asked) == 1


def test_a_public_reply_is_sent_once(host: Host, httpserver: HTTPServer, graph: GraphClient) -> None:
    user, asked = host.user(), answer_with(httpserver, 200)
    config = action_config(
        {
            "mode": "STATIC",
            "static_message": "hello",
            "public_reply_enabled": True,
            "public_reply_text": "see your messages",
        }
    )
    assert send(user, graph, config=config) == send(user, graph, config=config)
    assert len(asked) == 2


def test_a_message_that_certainly_failed_is_sent_again(host: Host, httpserver: HTTPServer, graph: GraphClient) -> None:
    user, asked = host.user(), answer_with(httpserver, 500, 200)
    with pytest.raises(GraphError):
        send(user, graph)
    assert send(user, graph).status == "sent"
    assert len(asked) == 2


def test_a_message_in_progress_when_its_worker_died_is_unknown_and_not_sent_again(
    host: Host, connection: Connection, httpserver: HTTPServer, graph: GraphClient
) -> None:
    user, asked = host.user(), answer_with(httpserver, 200)
    begin_effect(connection, user_id=user, task_id=TASK, effect="instagram_message", detail={})
    result = send(user, graph)
    assert (result.status, result.message) == ("unknown", None)
    assert asked == []
    [effect] = list_unresolved_effects(connection)
    assert (effect.user_id, effect.task_id, effect.effect) == (user, TASK, "instagram_message")


def test_an_unknown_message_is_sent_again_if_the_settings_allow_it(
    host: Host, connection: Connection, httpserver: HTTPServer, graph: GraphClient
) -> None:
    user, asked = host.user(), answer_with(httpserver, 200)
    begin_effect(connection, user_id=user, task_id=TASK, effect="instagram_message", detail={})
    assert send(user, graph, resend_unknown=True).status == "sent"
    assert len(asked) == 1
    assert list_unresolved_effects(connection) == []


def test_a_message_without_an_answer_is_recorded_as_unknown(
    host: Host, connection: Connection, httpserver: HTTPServer, graph: GraphClient
) -> None:
    user, asked = host.user(), answer_with(httpserver, 504)
    with pytest.raises(GraphError) as raised:
        send(user, graph)
    assert raised.value.outcome_unknown
    assert [effect.effect for effect in list_unresolved_effects(connection)] == ["instagram_message"]
    assert send(user, graph).status == "unknown"
    assert len(asked) == 1


def test_a_message_that_a_time_limit_interrupts_is_recorded_as_unknown(host: Host, connection: Connection) -> None:
    outbox = Outbox(user_id=host.user(), task_id=TASK, resend_unknown=False)

    def interrupted() -> dict[str, Any]:
        raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        outbox.once("instagram_message", {}, interrupted)
    [effect] = list_unresolved_effects(connection)
    assert (effect.status, effect.detail) == ("unknown", {"error": "SoftTimeLimitExceeded"})
