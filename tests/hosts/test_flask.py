"""A real Flask application on PostgreSQL, served by werkzeug, called over HTTP."""

import pytest

from tests.hosts.checks import (
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
    denied,
)
from tests.hosts.conftest import Site
from tests.hosts.people import POOR, RACERS, RICH, SPENT, Person
from tests.hosts.running import Server
from tests.support.books import assert_true

PATHS = ["/view", "/async-view"]


@pytest.mark.parametrize("path", PATHS)
def test_who_has_tokens_is_let_in_and_nobody_is_not(flask_server: Server, path: str) -> None:
    assert_lets_in(flask_server, path)
    assert_turns_nobody_in(flask_server, path)


@denied
@pytest.mark.parametrize("path", PATHS)
def test_who_may_not_is_answered_with_the_specifications_body(flask_server: Server, path: str, person: Person) -> None:
    assert_denied(flask_server.post(path, person), person)


@denied
def test_a_subscription_is_asked_for_without_regard_to_its_tokens(flask_server: Server, person: Person) -> None:
    assert_asks_for_a_subscription_only(flask_server, "/subscribers", person)


def test_without_the_database_nobody_is_let_in_and_afterwards_as_before(flask_server: Server, plain_site: Site) -> None:
    for path in PATHS:
        assert_lets_in(flask_server, path)
    with plain_site.away_from_trueup():
        for path in (*PATHS, "/subscribers", "/spend"):
            assert_closed(flask_server, path)
    assert_lets_in(flask_server, "/view")


def test_requests_at_once_never_overspend(flask_server: Server, plain_site: Site) -> None:
    assert_requests_at_once_never_overspend(flask_server, plain_site.host, RACERS[0])
    assert_true(plain_site.host)


def test_the_manuals_example_runs(flask_server: Server) -> None:
    assert flask_server.post("/manual/summary", RICH).json() == {"summary": "generated"}
    assert_denied(flask_server.post("/manual/summary", SPENT), SPENT, feature="Summaries")
    assert flask_server.post("/manual/summary", None).status_code == 401


def test_the_manuals_other_user_is_the_one_who_pays(flask_server: Server) -> None:
    assert flask_server.post(f"/another/teams/{RICH.id}/summary", None).json() == {"summary": "generated"}
    assert_denied(flask_server.post(f"/another/teams/{POOR.id}/summary", RICH), POOR, feature="Summaries")


def test_a_streaming_view_is_charged_for_what_it_streamed(flask_server: Server, plain_site: Site) -> None:
    assert_streams(flask_server, "/streaming/summary", plain_site.host)
    assert_charges_what_was_streamed(flask_server, "/streaming/summary", plain_site.host)
    assert_denies_before_it_streams(flask_server, "/streaming/summary", SPENT)
    assert_logged_no_error((plain_site.folder / "werkzeug.log").read_text())
