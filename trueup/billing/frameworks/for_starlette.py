"""Starlette and FastAPI endpoints."""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from trueup.billing.frameworks.adapter import View, first_instance, known_user, loaded
from trueup.billing.view_guard import Refusal

# Parameters that are taken for the user, if a dependency fills them; the first that is there. Beside a current_user,
# user is whom the request is about, often by an id that the caller chose.
USER_PARAMETERS = ("current_user", "user")


@dataclass(frozen=True)
class _StarletteCall:
    request: Any
    given: dict[str, object]

    def user(self) -> Any:
        """Return what a dependency gave as the user, if it was one's task to."""
        return known_user(next(iter(self.given.values()))) if self.given else request_user(self.request)

    async def auser(self) -> Any:
        return self.user()

    def answer(self, refusal: Refusal) -> Any:
        return json_response(refusal)

    def undo(self) -> None:
        """Neither has a transaction of its own."""


def request_user(request: Any) -> Any:
    """Return `request.state.user`, or that of the authentication middleware; None without one."""
    state = request.scope.get("state", {})
    return known_user(state["user"] if "user" in state else request.scope.get("user"))


def json_response(refusal: Refusal) -> Any:
    """Return the refusal as a response of Starlette's."""
    return import_module("starlette.responses").JSONResponse(
        dict(refusal.body), status_code=refusal.status, headers=dict(refusal.headers)
    )


def find(view: View, args: tuple[object, ...], kwargs: dict[str, object]) -> _StarletteCall | None:
    request = first_instance(loaded("starlette.requests", "Request"), (*args, *kwargs.values()))
    given = {name: kwargs[name] for name in _user_parameters(view.function) if name in kwargs}
    return _StarletteCall(request, given) if request is not None or given else None


@cache
def _user_parameters(view: Callable[..., Any]) -> tuple[str, ...]:
    """Return the view's parameters that hold the user because a dependency of FastAPI's fills them.

    Any other parameter of such a name is the caller's to choose, from the path or the query: it says nothing of who
    the caller is.
    """
    depends = loaded("fastapi.params", "Depends")
    if depends is None:
        return ()
    parameters = inspect.signature(view).parameters
    wanted = [name for name in USER_PARAMETERS if name in parameters]
    if not wanted:
        return ()
    try:
        hints = typing.get_type_hints(inspect.unwrap(view), include_extras=True)
    except NameError:  # FastAPI could not read them either
        hints = {}
    return tuple(
        name
        for name in wanted
        if isinstance(parameters[name].default, depends)
        or any(isinstance(note, depends) for note in getattr(hints.get(name), "__metadata__", ()))
    )
