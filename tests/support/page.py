"""For tests of the live page: a browser's cookies and forms, without a browser."""

import re
from typing import Any

import httpx
from fastapi.testclient import TestClient
from sqlalchemy import Connection

from tests.support.host import Host
from trueup.api.page.viewers import COOKIE
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.monitoring.page_access import make_link
from trueup.reconcile.local_run import reconcile

_TOKEN = re.compile(r'name="form_token" value="([0-9a-f]{64})"')


def token_of(answer: httpx.Response) -> str:
    """Return the token of the forms on a page."""
    found = _TOKEN.search(answer.text)
    assert found, answer.text
    return found[1]


def post(client: TestClient, path: str, page: httpx.Response, **fields: Any) -> httpx.Response:
    """Post a form of a page, as a browser does. Redirects are not followed."""
    return client.post(path, data={"form_token": token_of(page), **fields}, follow_redirects=False)


def sign_in(client: TestClient, connection: Connection, operator: str = "ann") -> str:
    """Open a session by a login link. Returns the link's path."""
    path = f"/login/{make_link(connection, operator)}"
    answer = post(client, path, client.get(path))
    assert (answer.status_code, answer.headers["location"]) == (303, "/"), answer.text
    return path


def cookie_of(client: TestClient) -> str:
    return str(client.cookies[COOKIE])


def credited(host: Host, tokens: int = 500) -> int:
    """Let a run find a drift in review: a counter with too many tokens, as after buying a pack. Returns its user."""
    user = host.subscriber(10_000)
    host.log(user, 600)
    host.decrement(user, 600)
    host.execute(
        "UPDATE billing_subscription SET tokens_remaining = tokens_remaining + :t WHERE user_id = :u", t=tokens, u=user
    )
    reconcile(get_engine(), HostMapping())
    return user


def drift_in_review(host: Host, user: int) -> int:
    drift: int = host.value(
        "SELECT id FROM trueup.drift WHERE user_id = :u AND action = 'review' ORDER BY id DESC LIMIT 1", u=user
    )
    return drift
