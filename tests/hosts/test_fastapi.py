"""A real FastAPI application with Starlette endpoints beside it, served by uvicorn, called over HTTP."""

import pytest

from tests.hosts.checks import (
    ANONYMOUS,
    assert_admits,
    assert_charges_what_was_streamed,
    assert_concurrent_requests_never_overspend,
    assert_denied,
    assert_denies_before_it_streams,
    assert_refuses_anonymous,
    assert_requires_only_a_subscription,
    assert_streams,
    assert_unavailable,
    denial_of,
    denied,
    logs_no_error,
)
from tests.hosts.conftest import Site
from tests.hosts.people import POOR, RACERS, RICH, SPENT, Person
from tests.hosts.running import Server
from tests.support.books import assert_true

DECORATED = ["/depends", "/async-depends", "/request", "/starlette/function", "/starlette/class"]
DEPENDENCIES = ["/dependency", "/dependency-of-state"]


@pytest.mark.parametrize("path", [*DECORATED, *DEPENDENCIES])
def test_a_user_with_tokens_is_admitted_and_an_anonymous_one_is_not(fastapi_server: Server, path: str) -> None:
    assert_admits(fastapi_server, path)
    assert_refuses_anonymous(fastapi_server, path)


@denied
@pytest.mark.parametrize("path", ["/async-depends", "/dependency"])
def test_a_denied_user_gets_the_specifications_body(fastapi_server: Server, path: str, person: Person) -> None:
    assert_denied(fastapi_server.post(path, person), person)


@pytest.mark.parametrize("path", [*DECORATED, *DEPENDENCIES])
def test_every_kind_of_endpoint_denies(fastapi_server: Server, path: str) -> None:
    assert_denied(fastapi_server.post(path, POOR), POOR)


@denied
@pytest.mark.parametrize("path", ["/subscribers", "/subscribers-dependency"])
def test_a_subscription_is_required_with_any_number_of_tokens(
    fastapi_server: Server, path: str, person: Person
) -> None:
    assert_requires_only_a_subscription(fastapi_server, path, person)


def test_the_signature_of_an_endpoint_is_kept(fastapi_server: Server) -> None:
    answer = fastapi_server.post("/async-depends?text=abc", RICH)
    assert answer.json() == {"user": RICH.id, "text": "abc"}
    assert fastapi_server.post("/chosen-by-the-caller", RICH).status_code == 422
    paths = fastapi_server.client(None).get("/openapi.json").json()["paths"]
    [parameter] = paths["/async-depends"]["post"]["parameters"]
    assert parameter["name"] == "text"


def test_a_user_in_the_query_is_never_taken_for_the_current_user(fastapi_server: Server) -> None:
    answer = fastapi_server.post(f"/chosen-by-the-caller?user={RICH.id}", POOR)
    assert_denied(answer, POOR)
    answer = fastapi_server.post(f"/chosen-by-the-caller?user={RICH.id}", None)
    assert (answer.status_code, answer.json()) == (401, ANONYMOUS)
    # The request names no user. After such an error uvicorn closes the connection without an answer.
    answer = fastapi_server.post(f"/unknown?user={RICH.id}", RICH, headers={"Connection": "close"})
    assert answer.status_code == 500


def test_another_user_among_the_parameters_is_never_taken_for_the_current_user(fastapi_server: Server) -> None:
    assert fastapi_server.post(f"/about-another?number={POOR.id}", RICH).json() == {"user": RICH.id, "about": POOR.id}
    assert_denied(fastapi_server.post(f"/about-another?number={RICH.id}", POOR), POOR)
    assert fastapi_server.post(f"/about-another?number={RICH.id}", None).status_code == 401


def test_a_dependency_without_handlers_has_the_same_status_and_body(fastapi_server: Server) -> None:
    answer = fastapi_server.post("/unanswering/dependency", POOR)
    assert (answer.status_code, answer.json()) == (402, {"detail": denial_of(POOR)})
    assert fastapi_server.post("/unanswering/dependency", None).status_code == 401
    assert fastapi_server.post("/unanswering/dependency", RICH).status_code == 200


def test_without_the_database_no_user_is_admitted_until_it_answers(fastapi_server: Server, plain_site: Site) -> None:
    paths = [*DECORATED, *DEPENDENCIES]
    for path in paths:
        assert_admits(fastapi_server, path)
    with plain_site.away_from_trueup():
        for path in (*paths, "/spend"):
            assert_unavailable(fastapi_server, path)
    assert_admits(fastapi_server, "/depends")


def test_concurrent_requests_never_overspend(fastapi_server: Server, plain_site: Site) -> None:
    assert_concurrent_requests_never_overspend(fastapi_server, plain_site.host, RACERS[0])
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


def test_the_manuals_endpoint_without_a_user_refuses_all(fastapi_server: Server) -> None:
    """Its user comes from a middleware that only the outer application has."""
    assert fastapi_server.post("/manual/tags?text=a", None).status_code == 401


STREAMS = ["/streaming/summary", "/streaming/digest", "/starlette/streaming"]
BY_HAND = ["/by-hand", "/async-by-hand"]


@pytest.mark.parametrize("path", STREAMS)
def test_a_streaming_view_is_charged_for_what_it_streamed(fastapi_server: Server, plain_site: Site, path: str) -> None:
    with logs_no_error(plain_site.folder / "asgi.log"):
        assert_streams(fastapi_server, path, plain_site.host)
        assert_charges_what_was_streamed(fastapi_server, path, plain_site.host)


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
    with logs_no_error(plain_site.folder / "asgi.log"):
        assert_streams(fastapi_server, path, plain_site.host)
