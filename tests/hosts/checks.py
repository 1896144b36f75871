"""Checks that every host must pass, with any framework."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hosts.people import LONG, POOR, PROMPT_TOKENS, REASONS, RICH, SHORT, SHORT_WORDS, SPENT, Person
from tests.hosts.running import Server
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.waiting import wait_for
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


def assert_streams(server: Server, path: str, host: Host, *, answers: int = 1) -> None:
    """The whole stream arrives and is charged, and the rest of its hold is released. `answers`: model calls in it."""
    before = host.used(RICH.id)
    answer = server.post(path, RICH, params={"text": SHORT})
    assert (answer.status_code, len(answer.text.split())) == (200, answers * SHORT_WORDS), answer.text
    wait_until_nothing_is_held(host, RICH)
    assert host.used(RICH.id) - before == answers * (PROMPT_TOKENS + SHORT_WORDS)


def assert_charges_what_was_streamed(server: Server, path: str, host: Host) -> None:
    """The client is gone in the middle: the hold ends, charged for the part that the provider gave."""
    before = host.used(RICH.id)
    with server.client(RICH).stream("POST", path, params={"text": LONG}) as answer:
        assert answer.status_code == 200
        next(answer.iter_raw(1))
    wait_until_nothing_is_held(host, RICH)
    charged = host.used(RICH.id) - before
    assert PROMPT_TOKENS < charged < 1500, charged
    assert host.value("SELECT bool_or(late) FROM trueup.charge WHERE user_id = :user", user=RICH.id) is False


def assert_breaks_off(server: Server, path: str, host: Host) -> None:
    """The server fails after the hold was opened: it ends without a charge."""
    before = host.used(RICH.id)
    with suppress(httpx.RemoteProtocolError):
        assert server.post(path, RICH, params={"text": SHORT}).status_code == 500
    wait_until_nothing_is_held(host, RICH)
    status = host.value("SELECT status FROM trueup.hold WHERE user_id = :user ORDER BY id DESC LIMIT 1", user=RICH.id)
    assert (status, host.used(RICH.id)) == ("released", before)


def assert_denies_before_it_streams(server: Server, path: str, person: Person) -> None:
    answer = server.post(path, person, params={"text": SHORT})
    assert (answer.status_code, answer.json()["success"]) == (402, False)
    assert answer.json()["error_code"] == REASONS[person]


@contextmanager
def logs_no_error(log: Path) -> Iterator[None]:
    """Check what the server logs during the block; earlier tests may have caused errors."""
    before = len(log.read_text())
    yield
    logged = log.read_text()[before:]
    for sign in ("ValueError", "different Context", "Traceback (most recent call last)", "never awaited"):
        assert sign not in logged, logged


def wait_until_nothing_is_held(host: Host, person: Person) -> None:
    held = "SELECT count(*) = 0 FROM trueup.hold WHERE status = 'open' AND user_id = :user"
    wait_for(lambda: bool(host.value(held, user=person.id)), "the stream's hold to end")
    assert host.value("SELECT held FROM trueup.balance WHERE user_id = :user", user=person.id) == 0
    assert_true(host)
