"""A real Django project with REST framework and simplejwt, served over WSGI and ASGI, called over HTTP."""

import pytest

from tests.hosts.checks import (
    ANONYMOUS,
    assert_admits,
    assert_breaks_off,
    assert_charges_what_was_streamed,
    assert_concurrent_requests_never_overspend,
    assert_denied,
    assert_denies_before_it_streams,
    assert_refuses_anonymous,
    assert_requires_only_a_subscription,
    assert_streams,
    assert_unavailable,
    denied,
)
from tests.hosts.conftest import Site
from tests.hosts.documents import SPECIFICATION, code_under
from tests.hosts.people import POOR, RACERS, RICH, SPENT, STOPPED, Person
from tests.hosts.running import Server, run_module
from tests.support.books import assert_true
from trueup.billing.token_hold import ai_tokens
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.llm.model import Message
from trueup.llm.tokens import count_prompt_tokens, counter_for
from trueup.settings.settings import get_settings

REST = ["/rest/class", "/rest/open", "/rest/method-decorator", "/rest/viewset", "/rest/function"]
DJANGO = ["/django/function", "/django/class", "/django/async-function", "/django/async-class"]


@pytest.fixture(params=["django_wsgi", "django_asgi"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("path", [*REST, *DJANGO])
def test_a_user_with_tokens_is_admitted(server: Server, path: str) -> None:
    assert_admits(server, path)


@pytest.mark.parametrize("path", DJANGO)
def test_django_refuses_an_anonymous_user(server: Server, path: str) -> None:
    assert_refuses_anonymous(server, path)


@pytest.mark.parametrize("path", REST)
def test_rest_framework_refuses_an_anonymous_user_in_its_own_way(server: Server, path: str) -> None:
    answer = server.post(path, None)
    assert (answer.status_code, answer.json()) == (401, {"detail": "Authentication credentials were not provided."})
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@denied
@pytest.mark.parametrize("path", ["/rest/class", "/django/async-class"])
def test_a_denied_user_gets_the_specifications_body(server: Server, path: str, person: Person) -> None:
    assert_denied(server.post(path, person), person)


@pytest.mark.parametrize("path", [*REST, *DJANGO])
def test_every_kind_of_view_denies(server: Server, path: str) -> None:
    assert_denied(server.post(path, POOR), POOR)


@denied
def test_a_subscription_is_required_with_any_number_of_tokens(server: Server, person: Person) -> None:
    assert_requires_only_a_subscription(server, "/rest/subscribers", person)


def test_without_the_database_no_user_is_admitted_until_it_answers(server: Server, django_site: Site) -> None:
    paths = ["/rest/class", "/rest/subscribers", *DJANGO]
    for path in paths:
        server.client(RICH)  # logs in first, while the host's own database is available
        assert_admits(server, path)
    with django_site.away_from_trueup():
        for path in paths:
            assert_unavailable(server, path)
        assert server.post("/django/function", None).json() == ANONYMOUS
    assert_admits(server, "/rest/class")


def test_concurrent_requests_never_overspend(django_wsgi: Server, django_asgi: Server, django_site: Site) -> None:
    assert_concurrent_requests_never_overspend(django_wsgi, django_site.host, RACERS[0])
    assert_concurrent_requests_never_overspend(django_asgi, django_site.host, RACERS[1])
    assert_true(django_site.host)


def test_a_denied_hold_rolls_back_the_views_earlier_writes(server: Server, django_site: Site) -> None:
    answer = server.post("/write-then-hold", RICH)
    assert (answer.status_code, answer.json()["error_code"]) == (402, "insufficient_tokens")
    assert django_site.host.value("SELECT count(*) FROM billing_tokenplan WHERE name = 'half a purchase'") == 0


def test_a_duplicate_of_a_running_request_is_answered_409(django_wsgi: Server) -> None:
    key = {"Idempotency-Key": "order 7"}
    with ai_tokens(RICH.id, 1000, "Spending", "chat", key="order 7") as running:
        running.charge(prompt_tokens=900, completion_tokens=100, model_name="m")
        answer = django_wsgi.post("/spend", RICH, headers=key)
        assert (answer.status_code, answer.json()["error_code"]) == (409, "request_in_progress")
        assert answer.headers["Retry-After"] == "5"
    assert django_wsgi.post("/spend", RICH, headers=key).status_code == 200


def test_the_specifications_first_example_shows_the_true_figures(server: Server) -> None:
    answer = server.client(SPENT).get("/specification/1")
    assert answer.json() == {
        "original_tokens": 2_000,
        "consumed_tokens": 2_000,
        "tokens_remaining": 0,
        "usage_percentage": 100.0,
    }
    assert get_accurate_tokens_remaining(SPENT.id) == (2_000, 2_000, 0)


def test_the_specifications_second_example_denies_with_its_message(server: Server) -> None:
    assert server.post("/specification/2", RICH).json() == {"result": "done"}
    answer = server.post("/specification/2", STOPPED)
    assert (answer.status_code, answer.json()) == (403, {"detail": "Access denied: Subscription is deactivated"})


def test_the_specifications_third_example_is_gated(server: Server) -> None:
    assert server.post("/specification/3", RICH).json() == {"result": "generated"}
    answer = server.post("/specification/3", SPENT)
    assert (answer.status_code, answer.json()["error_code"]) == (402, "no_tokens_remaining")
    assert server.post("/specification/3", None).status_code == 401


def test_the_specifications_solution_equals_the_log(server: Server) -> None:
    assert server.post("/specification/solution", SPENT).json() == [2_000, 2_000, 0]


def test_the_specifications_decorated_view_denies(server: Server) -> None:
    """Its body returns nothing, which REST framework refuses from a view that runs."""
    assert_denied(server.post("/specification/decorator", SPENT), SPENT)


@pytest.mark.parametrize("person", [RICH, SPENT])
def test_the_specifications_function_runs(server: Server, person: Person) -> None:
    assert server.post("/specification/function", person).json() == {"returned": None}


def test_the_specifications_own_test_of_the_gate_runs_in_the_projects_shell(django_site: Site) -> None:
    code = code_under(SPECIFICATION, "Test Token Enforcement:")
    printed = run_module("tests.hosts.django_drf.manage", "shell", "-c", code, host_url=django_site.url)
    assert printed.splitlines()[-3:] == [
        "Original: 5000, Consumed: 4500, Remaining: 500",
        "Has access: False",
        "Reason: insufficient_tokens",
    ]


@pytest.mark.parametrize("path", ["/manual/rest", "/manual/function", "/manual/async"])
def test_the_manuals_examples_run(server: Server, path: str) -> None:
    assert server.post(path, RICH).is_success
    assert_denied(server.post(path, SPENT), SPENT, feature="Summaries")
    assert server.post(path, None).status_code == 401


def test_the_manuals_example_sees_a_subscription_before_its_commit(server: Server) -> None:
    access = server.post("/manual/subscribe", RICH).json()
    assert (access["has_access"], access["tokens_remaining"]) == (True, 2_000)


def test_the_manuals_example_of_a_hold_charges_its_usage(server: Server, django_site: Site) -> None:
    before = django_site.host.used(RICH.id)
    prompt = count_prompt_tokens([Message(role="user", content="Hello")], counter_for(get_settings().model_name))
    answer = server.post("/manual/hold", RICH, json={"text": "Hello"}).json()
    assert answer == {"summary": f"of at most {1_500 - prompt}"}
    assert django_site.host.used(RICH.id) == before + 300
    assert_denied(server.post("/manual/hold", POOR, json={"text": "Hello"}), POOR, feature="Summaries")
    assert_true(django_site.host)


@pytest.mark.parametrize(
    ("kind", "path"),
    [("django_wsgi", "/manual/stream"), ("django_asgi", "/manual/async-stream")],
)
def test_a_streaming_view_is_charged_for_what_it_streamed(
    kind: str, path: str, django_site: Site, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(kind)
    assert_streams(server, path, django_site.host)
    assert_charges_what_was_streamed(server, path, django_site.host)
    assert_denies_before_it_streams(server, path, SPENT)


def test_a_stream_that_django_breaks_off_leaves_nothing_held(django_wsgi: Server, django_site: Site) -> None:
    """Under WSGI Django warns of an asynchronous iterator. In the tests' servers a warning is an error."""
    assert_breaks_off(django_wsgi, "/manual/async-stream", django_site.host)
