"""A real FastAPI application with Starlette endpoints beside it, served by uvicorn, called over HTTP."""

import pytest

from tests.hosts.checks import (
    NOBODY,
    assert_asks_for_a_subscription_only,
    assert_charges_what_was_streamed,
    assert_closed,
    assert_denied,
    assert_denies_before_it_streams,
    assert_lets_in,
    assert_logged_no_error,
    assert_requests_at_once_never_overspend,
    assert_streams,
    assert_turns_nobody_in,
    denial_of,
    denied,
)
from tests.hosts.conftest import Site
from tests.hosts.people import POOR, RACERS, RICH, SPENT, Person
from tests.hosts.running import Server
from tests.support.books import assert_true

DECORATED = ["/depends", "/async-depends", "/request", "/starlette/function", "/starlette/class"]
DEPENDENCIES = ["/dependency", "/dependency-of-state"]


@pytest.mark.parametrize("path", [*DECORATED, *DEPENDENCIES])
def test_who_has_tokens_is_let_in_and_nobody_is_not(fastapi_server: Server, path: str) -> None:
    assert_lets_in(fastapi_server, path)
    assert_turns_nobody_in(fastapi_server, path)


@denied
@pytest.mark.parametrize("path", ["/async-depends", "/dependency"])
def test_who_may_not_is_answered_with_the_specifications_body(
    fastapi_server: Server, path: str, person: Person
) -> None:
    assert_denied(fastapi_server.post(path, person), person)


@pytest.mark.parametrize("path", [*DECORATED, *DEPENDENCIES])
def test_every_kind_of_endpoint_denies(fastapi_server: Server, path: str) -> None:
    assert_denied(fastapi_server.post(path, POOR), POOR)


@denied
@pytest.mark.parametrize("path", ["/subscribers", "/subscribers-dependency"])
def test_a_subscription_is_asked_for_without_regard_to_its_tokens(
    fastapi_server: Server, path: str, person: Person
) -> None:
    assert_asks_for_a_subscription_only(fastapi_server, path, person)


def test_the_signature_of_an_endpoint_is_kept(fastapi_server: Server) -> None:
    answer = fastapi_server.post("/async-depends?text=abc", RICH)
    assert answer.json() == {"user": RICH.id, "text": "abc"}
    assert fastapi_server.post("/chosen-by-the-caller", RICH).status_code == 422
    paths = fastapi_server.client(None).get("/openapi.json").json()["paths"]
    [parameter] = paths["/async-depends"]["post"]["parameters"]
    assert parameter["name"] == "text"


def test_a_user_in_the_query_is_never_taken_for_who_is_asking(fastapi_server: Server) -> None:
    answer = fastapi_server.post(f"/chosen-by-the-caller?user={RICH.id}", POOR)
    assert_denied(answer, POOR)
    answer = fastapi_server.post(f"/chosen-by-the-caller?user={RICH.id}", None)
    assert (answer.status_code, answer.json()) == (401, NOBODY)
    # Nothing says who is asking. After such an error uvicorn closes the connection without a word.
    answer = fastapi_server.post(f"/unknown?user={RICH.id}", RICH, headers={"Connection": "close"})
    assert answer.status_code == 500


def test_beside_the_current_user_another_is_never_taken_for_who_is_asking(fastapi_server: Server) -> None:
    assert fastapi_server.post(f"/about-another?number={POOR.id}", RICH).json() == {"user": RICH.id, "about": POOR.id}
    assert_denied(fastapi_server.post(f"/about-another?number={RICH.id}", POOR), POOR)
    assert fastapi_server.post(f"/about-another?number={RICH.id}", None).status_code == 401


def test_a_dependency_without_handlers_has_the_same_status_and_body(fastapi_server: Server) -> None:
    answer = fastapi_server.post("/unanswering/dependency", POOR)
    assert (answer.status_code, answer.json()) == (402, {"detail": denial_of(POOR)})
    assert fastapi_server.post("/unanswering/dependency", None).status_code == 401
    assert fastapi_server.post("/unanswering/dependency", RICH).status_code == 200


def test_without_the_database_nobody_is_let_in_and_afterwards_as_before(
    fastapi_server: Server, plain_site: Site
) -> None:
    paths = [*DECORATED, *DEPENDENCIES]
    for path in paths:
        assert_lets_in(fastapi_server, path)
    with plain_site.away_from_trueup():
        for path in (*paths, "/spend"):
            assert_closed(fastapi_server, path)
    assert_lets_in(fastapi_server, "/depends")


def test_requests_at_once_never_overspend(fastapi_server: Server, plain_site: Site) -> None:
    assert_requests_at_once_never_overspend(fastapi_server, plain_site.host, RACERS[0])
    assert_true(plain_site.host)


@pytest.mark.parametrize(
    ("path", "tokens", "feature"),
    [
        ("/manual/summary?text=a", 1500, "Summaries"),
        ("/manual/titles?text=a", 700, "Titles"),
        ("/starlette/manual", 1500, "Summaries"),
    ],
)
def test_the_manuals_examples_run(fastapi_server: Server, path: str, tokens: int, feature: str) -> None:
    assert fastapi_server.post(path, RICH).status_code == 200
    assert_denied(fastapi_server.post(path, SPENT), SPENT, tokens=tokens, feature=feature)
    assert fastapi_server.post(path, None).status_code == 401


def test_the_manuals_endpoint_without_a_user_turns_everybody_away(fastapi_server: Server) -> None:
    """Its user comes from a middleware that only the outer application has."""
    assert fastapi_server.post("/manual/tags?text=a", None).status_code == 401


STREAMS = ["/streaming/summary", "/streaming/digest", "/starlette/streaming"]
BY_HAND = ["/by-hand", "/async-by-hand"]


@pytest.mark.parametrize("path", STREAMS)
def test_a_streaming_view_is_charged_for_what_it_streamed(fastapi_server: Server, plain_site: Site, path: str) -> None:
    assert_streams(fastapi_server, path, plain_site.host)
    assert_charges_what_was_streamed(fastapi_server, path, plain_site.host)
    assert_logged_no_error((plain_site.folder / "asgi.log").read_text())


@pytest.mark.parametrize("path", STREAMS)
def test_a_streaming_view_is_denied_before_it_streams(fastapi_server: Server, path: str) -> None:
    assert_denies_before_it_streams(fastapi_server, path, SPENT)


@pytest.mark.parametrize("path", ["/two-answers", "/async-two-answers"])
def test_each_step_of_a_stream_finds_its_hold(fastapi_server: Server, plain_site: Site, path: str) -> None:
    assert_streams(fastapi_server, path, plain_site.host, answers=2)
    assert_charges_what_was_streamed(fastapi_server, path, plain_site.host)


@pytest.mark.parametrize("path", BY_HAND)
def test_a_generator_that_manages_its_own_hold_ends_it_in_another_context(
    fastapi_server: Server, plain_site: Site, path: str
) -> None:
    assert_streams(fastapi_server, path, plain_site.host)
    assert_logged_no_error((plain_site.folder / "asgi.log").read_text())
