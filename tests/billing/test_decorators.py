"""The decorators themselves. tests/hosts tests them in real applications."""

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from tests.support.host import Host
from tests.support.round_trips import round_trips
from trueup.billing.decorators import check_tokens_for_function, require_active_subscription, require_ai_tokens
from trueup.billing.frameworks.fastapi import active_subscription_required, ai_tokens_required
from trueup.billing.utils import check_ai_access_for_user
from trueup.errors import HoldBusyError, InvalidInputError, NotInstalledError, TokensDenied

FRAMEWORKS = ("asgiref", "django", "fastapi", "flask", "flask_login", "rest_framework", "starlette", "werkzeug")


def test_the_check_for_functions_is_the_check_for_users(host: Host) -> None:
    user = host.subscriber(1_000)
    assert check_tokens_for_function(user, 900, "Mine") == check_ai_access_for_user(user, 900, "Mine")
    assert check_tokens_for_function(user, 1_001, "Mine") == check_ai_access_for_user(user, 1_001, "Mine")


def test_the_default_estimate_is_1500_tokens(host: Host) -> None:
    user = host.subscriber(1_500)
    assert check_tokens_for_function(user)["has_access"]
    host.log(user, 1)
    assert check_tokens_for_function(user)["reason"] == "insufficient_tokens"
    assert check_tokens_for_function(user, feature_name="Mine")["message"].startswith("Insufficient tokens for Mine")


def request_of(user: Any) -> Request:
    return Request({"type": "http", "state": {"user": user}})


def ask(view: Callable[..., Any], user: Any) -> tuple[int, bytes]:
    """Call a decorated view. Return the status and the body of the refusal, or 200 and the view's own answer."""
    answer = view(request_of(user))
    if asyncio.iscoroutine(answer):
        answer = asyncio.run(answer)
    return (answer.status_code, answer.body) if isinstance(answer, JSONResponse) else (200, answer)


def view(_request: Any) -> bytes:
    """Return that the view ran."""
    return b"ran"


async def async_view(_request: Any) -> bytes:
    return b"ran"


VIEWS = pytest.mark.parametrize("function", [view, async_view])


@VIEWS
def test_without_parentheses_the_defaults_apply(host: Host, function: Any) -> None:
    user = host.subscriber(1_500)
    assert ask(require_ai_tokens(function), user) == (200, b"ran")
    assert ask(require_active_subscription(function), user) == (200, b"ran")
    host.log(user, 1)
    status, body = ask(require_ai_tokens(function), user)
    assert (status, b"1500 needed" in body) == (402, True)


def test_a_decorated_view_keeps_its_name_docstring_and_attributes() -> None:
    def marked() -> None:
        """Words."""

    marked.csrf_exempt = True  # type: ignore[attr-defined]
    decorated = require_ai_tokens(10)(marked)
    assert (decorated.__name__, decorated.__doc__, decorated.__wrapped__) == ("marked", "Words.", marked)  # type: ignore[attr-defined]
    assert decorated.csrf_exempt  # type: ignore[attr-defined]
    assert inspect.iscoroutinefunction(require_ai_tokens(10)(async_view))


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "1500", None, 2**63])
def test_an_estimate_that_is_no_count_fails_when_the_module_is_imported(wrong: Any) -> None:
    for make in (require_ai_tokens, ai_tokens_required):
        with pytest.raises(InvalidInputError, match="estimated_tokens"):
            make(wrong, "Mine")


@pytest.mark.parametrize("wrong", ["", "  ", None, 5, "a\x00"])
def test_a_feature_without_a_name_fails_when_the_module_is_imported(wrong: Any) -> None:
    for make in (require_ai_tokens, ai_tokens_required):
        with pytest.raises(InvalidInputError, match="feature_name"):
            make(1500, wrong)


class _ClassView:
    """A class-based view, of which as_view and api_view make a function."""


def _generator() -> Iterator[str]:
    yield ""


async def _async_generator() -> AsyncIterator[str]:
    yield ""


def _as_view() -> None:
    """A function as Django makes of a class-based view."""


_as_view.view_class = _ClassView  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (_ClassView, "Decorate the view's function, or a method"),
        ("view", "Decorate the view's function, or a method"),
        (_generator, "streaming response"),
        (_async_generator, "streaming response"),
        (_as_view, "on the class's method"),
    ],
)
def test_decorating_an_object_that_is_no_view_fails_when_the_module_is_imported(wrong: Any, remedy: str) -> None:
    for decorate in (require_ai_tokens(10), require_active_subscription()):
        with pytest.raises(TypeError, match=remedy):
            decorate(wrong)


@pytest.mark.parametrize("decorator", [require_ai_tokens, require_active_subscription])
def test_an_unusable_loader_fails_when_the_module_is_imported(decorator: Any) -> None:
    async def load(_request: Any) -> int:
        return 1

    with pytest.raises(TypeError, match="user is 7"):
        decorator(user=7)
    with pytest.raises(TypeError, match="is not async"):
        decorator(user=load)(view)


@VIEWS
def test_a_loader_returns_the_user_who_pays(host: Host, function: Any) -> None:
    poor, rich = host.subscriber(10), host.subscriber(1_500)
    for loader in (lambda request: rich, lambda request: SimpleNamespace(pk=rich), lambda request: {"id": rich}):
        assert ask(require_ai_tokens(user=loader)(function), poor) == (200, b"ran")
    assert ask(require_ai_tokens(user=lambda request: None)(function), rich)[0] == 401


@VIEWS
def test_an_estimate_and_a_feature_can_be_given_with_a_loader(host: Host, function: Any) -> None:
    poor, rich = host.subscriber(10), host.subscriber(1_500)
    assert ask(require_ai_tokens(function, user=lambda request: rich), poor) == (200, b"ran")
    status, body = ask(require_ai_tokens(function, feature_name="Mine"), poor)
    assert (status, b"tokens for Mine" in body) == (402, True)
    assert ask(require_active_subscription(function, user=lambda request: rich), None) == (200, b"ran")


@VIEWS
def test_a_dict_of_two_users_is_an_error_of_the_host_and_neither_is_charged(host: Host, function: Any) -> None:
    user = host.subscriber(1_500)
    for same in ({"id": user, "user_id": str(user)}, {"id": None, "user_id": user}, {"user_id": user}):
        assert ask(require_ai_tokens(function), same) == (200, b"ran")
    with pytest.raises(InvalidInputError, match="two users"):
        ask(require_ai_tokens(function), {"id": user, "user_id": user + 1})


@VIEWS
def test_a_check_costs_one_round_trip(host: Host, tmp_path: Path, function: Any) -> None:
    user = host.subscriber()
    for number, decorated in enumerate((require_ai_tokens(function), require_active_subscription(function))):
        assert ask(decorated, user) == (200, b"ran")  # the first one connects
        with round_trips(tmp_path / str(number)) as seen:
            assert ask(decorated, user) == (200, b"ran")
        assert seen == ["I"]


def test_an_async_views_loader_may_be_async(host: Host) -> None:
    user = host.subscriber(1_500)

    async def load(_request: Any) -> int:
        return user

    assert ask(require_ai_tokens(user=load)(async_view), None) == (200, b"ran")


@VIEWS
@pytest.mark.parametrize(
    "anonymous",
    [None, SimpleNamespace(is_authenticated=False, pk=1), {"name": "no id"}],
    ids=["none", "anonymous", "dict"],
)
def test_a_missing_user_is_401_without_a_query_to_the_database(function: Any, anonymous: Any) -> None:
    status, body = ask(require_ai_tokens(function), anonymous)
    assert (status, b"not_authenticated" in body) == (401, True)


@VIEWS
def test_a_database_without_trueup_refuses_each_user(empty_database: str, function: Any) -> None:
    for decorated in (require_ai_tokens(function), require_active_subscription(function)):
        status, body = ask(decorated, 1)
        assert (status, b"not_ready" in body) == (503, True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TokensDenied({"error": "x", "error_code": "insufficient_tokens"}), 402),  # type: ignore[typeddict-item]
        (HoldBusyError("t", 5), 409),
        (NotInstalledError("no schema"), 503),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_that_the_view_raises_is_answered(host: Host, error: Exception, status: int, is_async: bool) -> None:
    def failing(_request: Any) -> None:
        raise error

    async def async_failing(_request: Any) -> None:
        raise error

    decorated = require_ai_tokens(async_failing if is_async else failing)
    assert ask(decorated, host.subscriber())[0] == status


@VIEWS
def test_a_malformed_user_id_raises_an_error_of_the_host(database: str, function: Any) -> None:
    with pytest.raises(InvalidInputError, match="user_id"):
        ask(require_ai_tokens(function), "five")


def test_the_error_for_a_view_without_a_request_names_the_view(database: str) -> None:
    with pytest.raises(TypeError, match=r"^view: there is no request"):
        require_ai_tokens(view)(7)


def test_the_decision_of_an_async_view_is_made_in_a_thread_of_its_own(host: Host) -> None:
    user, threads = host.subscriber(), []

    class User:
        @property
        def pk(self) -> int:
            threads.append(threading.current_thread())
            return user

    assert ask(require_ai_tokens(async_view), User()) == (200, b"ran")
    assert threads
    assert threading.main_thread() not in threads


def test_a_dependency_checks_the_user_of_the_applications_own_dependency(database: str) -> None:
    for dependency in (ai_tokens_required(), active_subscription_required()):
        with pytest.raises(Exception, match="401"):
            asyncio.run(dependency(request_of(None)))


@pytest.fixture
def flask_app() -> flask.Flask:
    app = flask.Flask("tests")
    app.post("/")(require_ai_tokens(lambda: "ran"))
    return app


def status_of(app: flask.Flask) -> int:
    return app.test_client().post("/").status_code


def test_flask_logins_user_counts_if_the_host_sets_no_user_itself(
    host: Host, flask_app: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = SimpleNamespace(id=host.subscriber(), is_authenticated=True)
    login = SimpleNamespace(current_user=SimpleNamespace(_get_current_object=lambda: user))
    assert status_of(flask_app) == 401
    monkeypatch.setitem(sys.modules, "flask_login", login)  # type: ignore[arg-type]
    assert status_of(flask_app) == 401
    flask_app.login_manager = object()  # type: ignore[attr-defined]
    assert status_of(flask_app) == 200
    user.is_authenticated = False
    assert status_of(flask_app) == 401


def test_the_user_that_a_flask_host_sets_itself_precedes_flask_logins(
    host: Host, flask_app: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor, rich = host.subscriber(10), SimpleNamespace(id=host.subscriber(), is_authenticated=True)
    login = SimpleNamespace(current_user=SimpleNamespace(_get_current_object=lambda: rich))
    monkeypatch.setitem(sys.modules, "flask_login", login)  # type: ignore[arg-type]
    flask_app.login_manager = object()  # type: ignore[attr-defined]
    flask_app.before_request(lambda: setattr(flask.g, "user", poor))
    assert status_of(flask_app) == 402


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_no_framework_is_needed_and_none_is_imported() -> None:
    blocked = f"import sys\nfor name in {FRAMEWORKS}: sys.modules[name] = None\n"
    use = """
import trueup.usage.log, trueup.billing.frameworks.fastapi
from trueup.billing.decorators import ai_tokens, require_active_subscription, require_ai_tokens
try:
    require_active_subscription(require_ai_tokens(10)(lambda request: None))(object())
except TypeError as error:
    print(error)
"""
    assert "there is no request" in run_python(blocked + use)
    loaded = f"import sys\nprint([name for name in {FRAMEWORKS} if name in sys.modules])"
    assert run_python(use + loaded).endswith("[]")


def test_on_a_function_of_rest_frameworks_the_wrong_order_fails_when_the_module_is_imported() -> None:
    code = """
from django.conf import settings
settings.configure()
from rest_framework.decorators import api_view
from rest_framework.views import APIView
from trueup.billing.decorators import require_ai_tokens
for view in (api_view(["POST"])(lambda request: None), APIView.as_view()):
    try:
        require_ai_tokens(10)(view)
    except TypeError as error:
        print("below @api_view" in str(error))
"""
    assert run_python(code).split() == ["True", "True"]
