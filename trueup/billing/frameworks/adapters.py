"""Adapters for views of Django, REST framework, Starlette, FastAPI and Flask: the request's user, and the refusal.

`find_adapter` chooses an adapter by the arguments of the call, so that one decorator serves all frameworks. A framework
is looked up in `sys.modules` and never imported before the host has imported it.
"""

import inspect
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from trueup.billing.view_guard import NOT_AUTHENTICATED, Refusal
from trueup.errors import InvalidInputError

ViewFunction = Callable[..., Any]
UserLoader = Callable[..., Any]

# Parameters that hold the user if a dependency fills them; the first one present counts. If there is a current_user,
# then user is the subject of the request, often by an id from the caller.
USER_PARAMETERS = ("current_user", "user")


class Adapter(ABC):
    """One call of a view."""

    @abstractmethod
    def user(self) -> Any:
        """Return the request's user; None if there is none."""

    async def auser(self) -> Any:
        """Return the request's user in an async view; None if there is none."""
        return self.user()

    @abstractmethod
    def answer(self, refusal: Refusal) -> Any:
        """Return the framework's response for a refusal, or raise the framework's exception for it."""

    def undo(self) -> None:  # noqa: B027 - most frameworks have no transaction
        """Make the framework roll back the view's transaction, as for an error of the view."""


def find_adapter(function: ViewFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Adapter:
    """Return the adapter for a call of the view. Raises TypeError if there is no request."""
    values = (*args, *kwargs.values())
    # REST framework's request class does not derive from Django's.
    if (request := _first_instance("rest_framework.request", "Request", values)) is not None:
        return _RestCall(request)
    if (request := _first_instance("django.http", "HttpRequest", values)) is not None:
        return _DjangoCall(request)
    request = _first_instance("starlette.requests", "Request", values)
    given = {name: kwargs[name] for name in _user_parameters(function) if name in kwargs}
    if request is not None or given:
        return _StarletteCall(request, given)
    has_request_context = _loaded("flask", "has_request_context")
    if has_request_context is not None and has_request_context():
        return _FlaskCall()
    raise TypeError(
        f"{name_of(function)}: there is no request to take the user from. Give the view a parameter `request` (Django, "
        "Starlette; in FastAPI `request: Request`, or `user` with a Depends), or run it within a request (Flask)."
    )


def name_of(function: ViewFunction) -> str:
    """Return a view's name for messages."""
    return getattr(function, "__qualname__", repr(function))


def known_user(user: Any) -> Any:
    """Return a user as `user_id_of` takes it: None for an anonymous user, the id for a dict of claims or a row.

    Raises `InvalidInputError` for a dict whose `id` and `user_id` differ, because one of them is another user's.
    """
    if user is None or not getattr(user, "is_authenticated", True):
        return None
    if isinstance(user, Mapping):
        ids = {key: user[key] for key in ("id", "user_id") if user.get(key) is not None}
        if len(set(map(str, ids.values()))) > 1:
            raise InvalidInputError(
                f"user: {ids} are two users. Give the decorator a function that returns the one who pays: user=…"
            )
        return next(iter(ids.values()), None)
    return user


def request_user(request: Any) -> Any:
    """Return `request.state.user`, or the user of the authentication middleware; None if there is none."""
    state = request.scope.get("state", {})
    return known_user(state["user"] if "user" in state else request.scope.get("user"))


def json_response(refusal: Refusal) -> Any:
    """Return the refusal as a response of Starlette's."""
    return import_module("starlette.responses").JSONResponse(
        dict(refusal.body), status_code=refusal.status, headers=dict(refusal.headers)
    )


class _DjangoCall(Adapter):
    def __init__(self, request: Any) -> None:
        self._request = request

    def user(self) -> Any:
        return known_user(getattr(self._request, "user", None))

    async def auser(self) -> Any:
        """Read the user in a thread where Django allows blocking calls, such as reading the session."""
        return await import_module("asgiref.sync").sync_to_async(self.user)()

    def answer(self, refusal: Refusal) -> Any:
        response = import_module("django.http").JsonResponse
        return response(dict(refusal.body), status=refusal.status, headers=dict(refusal.headers))

    def undo(self) -> None:
        for connection in import_module("django.db").connections.all(initialized_only=True):
            if connection.settings_dict["ATOMIC_REQUESTS"] and connection.in_atomic_block:
                connection.set_rollback(True)


class _RestCall(_DjangoCall):
    def answer(self, refusal: Refusal) -> Any:
        """Answer as REST framework does. Its own handlers answer for a missing user: they know how users log in."""
        if refusal is NOT_AUTHENTICATED:
            raise import_module("rest_framework.exceptions").NotAuthenticated
        response = import_module("rest_framework.response").Response
        return response(dict(refusal.body), status=refusal.status, headers=dict(refusal.headers))


class _StarletteCall(Adapter):
    def __init__(self, request: Any, given: dict[str, object]) -> None:
        self._request = request
        self._given = given

    def user(self) -> Any:
        return known_user(next(iter(self._given.values()))) if self._given else request_user(self._request)

    def answer(self, refusal: Refusal) -> Any:
        return json_response(refusal)


class _FlaskCall(Adapter):
    def user(self) -> Any:
        """Return `flask.g.user`. If the host does not set it and uses Flask-Login, return its `current_user`."""
        flask = import_module("flask")
        if "user" in flask.g or not hasattr(flask.current_app, "login_manager"):
            return known_user(flask.g.get("user"))
        current_user = _loaded("flask_login", "current_user")
        # current_user is a proxy, which works only within the request.
        return None if current_user is None else known_user(current_user._get_current_object())

    def answer(self, refusal: Refusal) -> Any:
        response = import_module("flask").jsonify(dict(refusal.body))
        response.status_code = refusal.status
        response.headers.update(refusal.headers)
        return response


def _loaded(module: str, name: str) -> Any:
    """Return an attribute of a module if the host has imported it, else None."""
    return getattr(sys.modules.get(module), name, None)


def _first_instance(module: str, name: str, values: Iterable[object]) -> Any:
    """Return the first value of that class; None if there is none, or if the host has not imported the class."""
    kind = _loaded(module, name)
    return None if kind is None else next((value for value in values if isinstance(value, kind)), None)


@cache
def _user_parameters(function: ViewFunction) -> tuple[str, ...]:
    """Return the view's parameters that hold the user because a dependency of FastAPI's fills them.

    The caller chooses any other parameter of such a name, in the path or the query, so it does not identify the caller.
    """
    depends = _loaded("fastapi.params", "Depends")
    if depends is None:
        return ()
    parameters = inspect.signature(function).parameters
    wanted = [name for name in USER_PARAMETERS if name in parameters]
    if not wanted:
        return ()
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except NameError:  # FastAPI could not read them either
        hints = {}
    return tuple(
        name
        for name in wanted
        if isinstance(parameters[name].default, depends)
        or any(isinstance(note, depends) for note in getattr(hints.get(name), "__metadata__", ()))
    )
