"""The specification's checks: decorators for views of Django, REST framework, FastAPI, Starlette and Flask; a function.

A check reserves nothing, so two concurrent requests may both pass. `ai_tokens` holds tokens for the work in a view.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from trueup.billing.frameworks.adapters import Adapter, UserLoader, find_adapter, known_user, name_of
from trueup.billing.token_hold import ai_tokens
from trueup.billing.utils import check_ai_access_for_user
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
from trueup.errors import TrueupError
from trueup.gate.denial import Access

__all__ = ["ai_tokens", "check_tokens_for_function", "require_active_subscription", "require_ai_tokens"]

DEFAULT_TOKENS = 1500  # from the specification

ViewFunction = TypeVar("ViewFunction", bound=Callable[..., Any])


def check_tokens_for_function(
    user: Any, estimated_tokens: int = DEFAULT_TOKENS, feature_name: str = "AI Feature"
) -> Access:
    """Return whether a task or service may use AI for the user; see `check_ai_access_for_user`."""
    return check_ai_access_for_user(user, estimated_tokens, feature_name)


@overload
def require_ai_tokens(
    estimated_tokens: ViewFunction, feature_name: str = "AI Feature", *, user: UserLoader | None = None
) -> ViewFunction: ...
@overload
def require_ai_tokens(
    estimated_tokens: int = DEFAULT_TOKENS, feature_name: str = "AI Feature", *, user: UserLoader | None = None
) -> Callable[[ViewFunction], ViewFunction]: ...
def require_ai_tokens(
    estimated_tokens: Any = DEFAULT_TOKENS, feature_name: str = "AI Feature", *, user: UserLoader | None = None
) -> Any:
    """Decorate a view so that it runs only if its user may spend about `estimated_tokens` tokens (a count).

    A refused view is answered with 401 without a user, 402 with the specification's body, or 503 if the database does
    not answer: the view never runs unchecked. If the view raises `TokensDenied` or `HoldBusyError`, the answer is 402
    or 409. This reserves nothing; for that, the view does its work in `with ai_tokens(…)`.
    `user`: a function that takes the view's arguments and returns the user, or a coroutine function for an async view;
    None means the framework's user. Without parentheses the defaults apply.
    Raises `InvalidInputError` or TypeError for wrong arguments when the module is imported.
    """
    if callable(estimated_tokens):
        return _guarding(token_gate(DEFAULT_TOKENS, feature_name), user)(estimated_tokens)
    return _guarding(token_gate(estimated_tokens, feature_name), user)


@overload
def require_active_subscription(view: ViewFunction, *, user: UserLoader | None = None) -> ViewFunction: ...
@overload
def require_active_subscription(*, user: UserLoader | None = None) -> Callable[[ViewFunction], ViewFunction]: ...
def require_active_subscription(view: Any = None, *, user: UserLoader | None = None) -> Any:
    """Decorate a view so that it runs only if its user has an active subscription, whatever tokens it has left.

    Refused views are answered as by `require_ai_tokens`; the reason of a 402 is `no_subscription`,
    `subscription_deactivated` or `subscription_expired`.
    """
    guard = _guarding(subscription_gate(), user)
    return guard if view is None else guard(view)


def _guarding(gate: Gate, user: UserLoader | None) -> Callable[[ViewFunction], ViewFunction]:
    if user is not None and not callable(user):
        raise TypeError(
            f"{gate.name}: user is {user!r}. Give a function of the view's arguments that returns the user."
        )

    def decorate(function: ViewFunction) -> ViewFunction:
        _refuse_non_view(gate, function)
        guarded = _guarded_async if inspect.iscoroutinefunction(function) else _guarded
        wrapper: ViewFunction = guarded(gate, function, user)
        return wrapper

    return decorate


def _refuse_non_view(gate: Gate, function: Any) -> None:
    if isinstance(function, type) or not callable(function):
        wrong = "is no function. Decorate the view's function, or a method such as post or get"
    elif hasattr(function, "cls") or hasattr(function, "view_class"):
        wrong = (
            "was made from a class, so the user is not known here yet. Put "
            f"@{gate.name} below @api_view, or on the class's method"
        )
    elif inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        wrong = (
            "is a generator, so no refusal can replace its answer. Return a streaming response, or use a dependency "
            "(trueup.billing.frameworks.fastapi)"
        )
    else:
        return
    raise TypeError(f"{gate.name}: {function!r} {wrong}.")


def _guarded(gate: Gate, function: Any, load: UserLoader | None) -> Any:
    if inspect.iscoroutinefunction(load):
        raise TypeError(f"{gate.name}: {name_of(function)} is not async, so its function for the user can't be async.")

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        adapter = find_adapter(function, args, kwargs)
        user = adapter.user() if load is None else known_user(load(*args, **kwargs))
        refusal = _refusal(gate, user)
        if refusal is not None:
            return adapter.answer(refusal)
        try:
            return function(*args, **kwargs)
        except ANSWERED as error:
            return _answer_error(adapter, error)

    return guarded


def _guarded_async(gate: Gate, function: Any, load: UserLoader | None) -> Any:
    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        adapter = find_adapter(function, args, kwargs)
        if load is None:
            user = await adapter.auser()
        else:
            found = load(*args, **kwargs)
            user = known_user(await found if inspect.isawaitable(found) else found)
        refusal = await in_thread(lambda: _refusal(gate, user))
        if refusal is not None:
            return adapter.answer(refusal)
        try:
            return await function(*args, **kwargs)
        except ANSWERED as error:
            return _answer_error(adapter, error)

    return guarded


def _refusal(gate: Gate, user: Any) -> Refusal | None:
    return NOT_AUTHENTICATED if user is None else gate.refusal(user)


def _answer_error(adapter: Adapter, error: TrueupError) -> Any:
    adapter.undo()
    return adapter.answer(refusal_for(error))
