"""FastAPI dependencies that check a user's tokens or subscription, and error handlers for an application."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any

from trueup.billing.frameworks.adapters import UserLoader, json_response, known_user, request_user
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
    """Return a dependency that guards a route as `require_ai_tokens` does: `Depends(ai_tokens_required(1500))`.

    `estimated_tokens`: a count. `user`: the application's dependency that returns the user; None means
    `request.state.user`, or the user of the authentication middleware. After `answer_denials(app)` the answers have the
    specification's body; without it they have the same status, and the body under "detail".
    Raises `InvalidInputError` for a malformed count or name.
    """
    return _dependency(token_gate(estimated_tokens, feature_name), user)


def active_subscription_required(*, user: UserLoader | None = None) -> Callable[..., Any]:
    """Return a dependency that guards a route as `require_active_subscription` does; see `ai_tokens_required`."""
    return _dependency(subscription_gate(), user)


def answer_denials(app: Any) -> None:
    """Make a FastAPI or Starlette application answer 401, 402, 409 and 503 with the specification's bodies.

    This covers the dependencies, and `ai_tokens` in any endpoint.
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
    """Return the error class of a refusing dependency. It derives from Starlette's, so it is not logged as a fault."""
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

    # FastAPI reads from the signature how to fill the parameter.
    filled: dict[str, Any] = {"annotation": fastapi.Request} if user is None else {"default": fastapi.Depends(user)}
    parameter = Parameter("given", Parameter.POSITIONAL_OR_KEYWORD, **filled)
    dependency.__signature__ = Signature([parameter])  # type: ignore[attr-defined]
    return dependency
