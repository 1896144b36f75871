"""Checks that every host must pass, with any framework."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.hosts.people import POOR, REASONS, RICH, SPENT, Person
from tests.hosts.running import Server
from tests.support.host import Host
from trueup.billing.utils import check_ai_access_for_user, get_accurate_tokens_remaining
from trueup.gate.denial import denial_payload

FEATURE = "My Feature"
ANONYMOUS = {"success": False, "error": "Authentication required", "error_code": "not_authenticated"}
AWAY = {
    "success": False,
    "error": "Tokens can't be checked or recorded now. Try again later",
    "error_code": "service_unavailable",
}

# Every reason of the gate, for the tests of each.
denied = pytest.mark.parametrize("person", REASONS, ids=lambda person: person.name)


def denial_of(person: Person, tokens: int = 1500, feature: str = FEATURE) -> dict[str, Any]:
    """Return the body of a 402 as the specification's own functions return it."""
    return dict(denial_payload(check_ai_access_for_user(person.id, tokens, feature)))


def assert_denied(answer: httpx.Response, person: Person, **asked: Any) -> None:
    assert (answer.status_code, answer.json()) == (402, denial_of(person, **asked))
    assert answer.json()["error_code"] == REASONS[person]


def assert_requires_only_a_subscription(server: Server, path: str, person: Person) -> None:
    """A user with a subscription is admitted, with any number of tokens left."""
    answer = server.post(path, person)
    if person in (POOR, SPENT):
        assert answer.json() == {"user": person.id}
    else:
        assert_denied(answer, person, tokens=0)


def assert_admits(server: Server, path: str) -> None:
    answer = server.post(path, RICH)
    assert (answer.status_code, answer.json()["user"]) == (200, RICH.id)


def assert_refuses_anonymous(server: Server, path: str) -> None:
    answer = server.post(path, None)
    assert (answer.status_code, answer.json()) == (401, ANONYMOUS)
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def assert_unavailable(server: Server, path: str) -> None:
    """Without the database no user is admitted. The answer says when to try again, but not where the database is."""
    answer = server.post(path, RICH)
    assert (answer.status_code, answer.json()) == (503, AWAY)
    assert answer.headers["Retry-After"] == "5"


def assert_concurrent_requests_never_overspend(server: Server, host: Host, person: Person) -> None:
    """Of eight requests of 1,000 tokens each, a budget of 4,000 pays for four, and all figures agree."""
    client = server.client(person)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/spend"), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [402] * 4
    assert {answer.json()["error_code"] for answer in answers if answer.status_code == 402} <= {
        "insufficient_tokens",
        "no_tokens_remaining",
    }
    assert client.get("/counts").json() == [4_000, 4_000, 0] == list(get_accurate_tokens_remaining(person.id))
    assert (host.used(person.id), host.counter(person.id)) == (4_000, 0)
