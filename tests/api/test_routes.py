"""No route bypasses the gate. The tests check every route; docs/features.md names the routes that can spend."""

import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.api.test_ai import BODIES
from tests.support.api import OPERATOR, bearer
from tests.support.host import Host
from trueup.api.page import documentation
from trueup.api.page import views as page

# For browsers: they are not in the OpenAPI document.
PAGES = {"/", "/docs", "/drifts/{number}", "/events", "/login", "/login/{link}", "/logout"}
FEATURES = (Path(__file__).parents[2] / "docs" / "features.md").read_text()


@pytest.fixture
def app(client: TestClient) -> Iterator[FastAPI]:
    app: Any = client.app
    app.state.celery.control.purge()
    yield app
    app.state.celery.control.purge()


def paths_of(routes: Iterable[Any]) -> Iterator[str]:
    """Yield the path of each route, of included routers too, whether or not OpenAPI shows it."""
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from paths_of(included.routes) if included else [route.path]


def sent_tasks(celery: Celery) -> list[str]:
    """Take the queued tasks; no worker runs."""
    with celery.connection_for_read() as connection:
        channel = connection.default_channel
        return [message.headers["task"] for message in iter(lambda: channel.basic_get("trueup-ai", no_ack=True), None)]


def test_every_route_is_in_the_document(app: FastAPI) -> None:
    assert set(paths_of(app.routes)) - {"/openapi.json"} - PAGES == set(app.openapi()["paths"])


def test_no_page_spends(app: FastAPI) -> None:
    pages = {path for router in (page.router, documentation.router) for path in paths_of(router.routes)}
    assert pages == PAGES  # a new page is looked at here: none of them may send a task


def test_each_route_that_can_spend_is_documented_and_denies(client: TestClient, app: FastAPI, host: Host) -> None:
    user = bearer(host.subscriber(0))
    spending = {path for path, methods in app.openapi()["paths"].items() if set(methods) - {"get", "head"}}
    assert spending == set(BODIES) == set(re.findall(r"`POST (\S+)`", FEATURES))
    assert [client.post(path, json=BODIES[path], headers=user).status_code for path in spending] == [402] * len(BODIES)
    assert sent_tasks(app.state.celery) == []


def test_no_other_route_sends_a_task(client: TestClient, app: FastAPI, host: Host) -> None:
    user = bearer(host.subscriber(), scope=OPERATOR)
    for path in set(app.openapi()["paths"]) - set(BODIES):
        client.get(path.format(run_id=1, task_id=uuid.uuid4()), headers=user)
    assert sent_tasks(app.state.celery) == []
    path, body = next(iter(BODIES.items()))
    client.post(path, json=body, headers=user)
    assert len(sent_tasks(app.state.celery)) == 1  # proves that the check above sees a sent task
