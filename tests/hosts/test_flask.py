"""A real Flask application on PostgreSQL, served by werkzeug, called over HTTP."""

import pytest

from tests.hosts.checks import (
    assert_admits,
    assert_charges_what_was_streamed,
    assert_concurrent_requests_never_overspend,
    assert_denied,
    assert_denies_before_it_streams,
    assert_refuses_anonymous,
    assert_requires_only_a_subscription,
    assert_streams,
    assert_unavailable,
    denied,
    logs_no_error,
)
from tests.hosts.conftest import Site
from tests.hosts.people import POOR, RACERS, RICH, SPENT, Person
from tests.hosts.running import Server
from tests.support.books import assert_true

PATHS = ["/view", "/async-view"]


@pytest.mark.parametrize("path", PATHS)
def test_a_user_with_tokens_is_admitted_and_an_anonymous_one_is_not(flask_server: Server, path: str) -> None:
    assert_admits(flask_server, path)
    assert_refuses_anonymous(flask_server, path)


@denied
@pytest.mark.parametrize("path", PATHS)
def test_a_denied_user_gets_the_specifications_body(flask_server: Server, path: str, person: Person) -> None:
    assert_denied(flask_server.post(path, person), person)


@denied
def test_a_subscription_is_required_with_any_number_of_tokens(flask_server: Server, person: Person) -> None:
    assert_requires_only_a_subscription(flask_server, "/subscribers", person)


def test_without_the_database_no_user_is_admitted_until_it_answers(flask_server: Server, plain_site: Site) -> None:
    for path in PATHS:
        assert_admits(flask_server, path)
    with plain_site.away_from_trueup():
        for path in (*PATHS, "/subscribers", "/spend"):
            assert_unavailable(flask_server, path)
    assert_admits(flask_server, "/view")


def test_concurrent_requests_never_overspend(flask_server: Server, plain_site: Site) -> None:
    assert_concurrent_requests_never_overspend(flask_server, plain_site.host, RACERS[0])
    assert_true(plain_site.host)


def test_the_manuals_example_runs(flask_server: Server) -> None:
    assert flask_server.post("/manual/summary", RICH).json() == {"summary": "generated"}
    assert_denied(flask_server.post("/manual/summary", SPENT), SPENT, feature="Summaries")
    assert flask_server.post("/manual/summary", None).status_code == 401


def test_the_manuals_other_user_pays(flask_server: Server) -> None:
    assert flask_server.post(f"/another/teams/{RICH.id}/summary", None).json() == {"summary": "generated"}
    assert_denied(flask_server.post(f"/another/teams/{POOR.id}/summary", RICH), POOR, feature="Summaries")


def test_a_streaming_view_is_charged_for_what_it_streamed(flask_server: Server, plain_site: Site) -> None:
    with logs_no_error(plain_site.folder / "werkzeug.log"):
        assert_streams(flask_server, "/streaming/summary", plain_site.host)
        assert_charges_what_was_streamed(flask_server, "/streaming/summary", plain_site.host)
        assert_denies_before_it_streams(flask_server, "/streaming/summary", SPENT)
