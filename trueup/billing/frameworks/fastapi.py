"""FastAPI's own way: dependencies that ask, for routes and routers, and handlers that answer for an application."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any

from trueup.billing.frameworks.adapter import UserLoader, known_user
from trueup.billing.frameworks.for_starlette import json_response, request_user
from trueup.billing.view_guard import (
    ANSWERED,
    NOT_AUTHENTICATED,
    Gate,
    Refusal,
    refusal_for,
    subscription_gate,
    token_gate,
)
from trueup.database.threads import in_thread


def ai_tokens_required(
    estimated_tokens: int = 1500, feature_name: str = "AI Feature", *, user: UserLoader | None = None
) -> Callable[..., Any]:
    """Return a dependency that lets a route run as `require_ai_tokens` does: `Depends(ai_tokens_required(1500))`.

    `user`: the application's own dependency that gives the user; None means `request.state.user` or that of the
    authentication middleware. The answers have the specification's body once `answer_denials(app)` was called; without
    it they have the same status, and the body under "detail".
    Raises `InvalidInputError` for what is no count or no name.
    """
    return _dependency(token_gate(estimated_tokens, feature_name), user)


def active_subscription_required(*, user: UserLoader | None = None) -> Callable[..., Any]:
    """Return a dependency that lets a route run as `require_active_subscription` does; see `ai_tokens_required`."""
    return _dependency(subscription_gate(), user)


def answer_denials(app: Any) -> None:
    """Have an application of FastAPI's or Starlette's answer 401, 402, 409 and 503 with the body that belongs to each.

    Those of the dependencies, and those of `ai_tokens` in any endpoint.
    """
    app.add_exception_handler(_refused(), _answer_refused)
    for kind in ANSWERED:
        app.add_exception_handler(kind, _answer_error)


async def _answer_refused(_request: Any, error: Any) -> Any:
    return json_response(error.refusal)


async def _answer_error(_request: Any, error: Any) -> Any:
    return json_response(refusal_for(error))


@cache
def _refused() -> type[Exception]:
    """Make the error that a dependency says no with. Being Starlette's own, no application takes it for a fault."""
    base: Any = import_module("starlette.exceptions").HTTPException

    class Refused(base):  # type: ignore[misc]
        def __init__(self, refusal: Refusal) -> None:
            super().__init__(refusal.status, detail=dict(refusal.body), headers=dict(refusal.headers))
            self.refusal = refusal

    return Refused


def _dependency(gate: Gate, user: UserLoader | None) -> Callable[..., Any]:
    fastapi = import_module("fastapi")

    async def dependency(given: Any) -> None:
        found = request_user(given) if user is None else known_user(given)
        refusal = NOT_AUTHENTICATED if found is None else await in_thread(lambda: gate.refusal(found))
        if refusal is not None:
            raise _refused()(refusal)

    # What FastAPI fills the parameter with, it reads from the signature.
    filled: dict[str, Any] = {"annotation": fastapi.Request} if user is None else {"default": fastapi.Depends(user)}
    parameter = Parameter("given", Parameter.POSITIONAL_OR_KEYWORD, **filled)
    dependency.__signature__ = Signature([parameter])  # type: ignore[attr-defined]
    return dependency
