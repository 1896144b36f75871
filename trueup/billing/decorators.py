"""The specification's checks: decorators for views of Django, REST framework, FastAPI, Starlette and Flask; a function.

`ai_tokens` holds tokens for the work inside a view, where a check alone would let two requests through at once.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from trueup.billing.frameworks import Adapter, View, find_adapter
from trueup.billing.frameworks.adapter import UserLoader, known_user
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

# The specification's.
DEFAULT_TOKENS = 1500

ViewFunction = TypeVar("ViewFunction", bound=Callable[..., Any])


def check_tokens_for_function(
    user: Any, estimated_tokens: int = DEFAULT_TOKENS, feature_name: str = "AI Feature"
) -> Access:
    """Say whether a task or service may use AI for the user; see `trueup.billing.utils.check_ai_access_for_user`."""
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
    """Let a view run only if its user may spend about `estimated_tokens` tokens; else answer in its place.

    401 without a user, 402 with the specification's body, 503 while nobody can tell: the view never runs unchecked.
    `TokensDenied` and `HoldBusyError` that leave the view are answered too, with 402 and 409. Nothing is reserved: for
    that the view's work goes into `with ai_tokens(…)`.
    `user`: a function that is given the view's arguments and returns the user, or a coroutine function for an async
    view; None means where the framework keeps it. Without parentheses the defaults hold.
    Raises `InvalidInputError` or TypeError, when the module is imported, for what can't be meant.
    """
    if callable(estimated_tokens):
        return _guarding(token_gate(DEFAULT_TOKENS, feature_name), user)(estimated_tokens)
    return _guarding(token_gate(estimated_tokens, feature_name), user)


@overload
def require_active_subscription(view: ViewFunction, *, user: UserLoader | None = None) -> ViewFunction: ...
@overload
def require_active_subscription(*, user: UserLoader | None = None) -> Callable[[ViewFunction], ViewFunction]: ...
def require_active_subscription(view: Any = None, *, user: UserLoader | None = None) -> Any:
    """Let a view run only if its user has a subscription that is active and has not ended, whatever is left of it.

    Answers as `require_ai_tokens` does; 402 with `no_subscription`, `subscription_deactivated` or
    `subscription_expired`.
    """
    guard = _guarding(subscription_gate(), user)
    return guard if view is None else guard(view)


def _guarding(gate: Gate, user: UserLoader | None) -> Callable[[ViewFunction], ViewFunction]:
    if user is not None and not callable(user):
        raise TypeError(f"{gate.name}: user is {user!r}; give a function of the view's arguments that returns the user")

    def decorate(function: ViewFunction) -> ViewFunction:
        _refuse_what_is_no_view(gate, function)
        view = View(function=function, name=getattr(function, "__qualname__", repr(function)))
        guarded = _guarded_async if inspect.iscoroutinefunction(function) else _guarded
        wrapper: ViewFunction = guarded(gate, view, user)
        return wrapper

    return decorate


def _refuse_what_is_no_view(gate: Gate, function: Any) -> None:
    if isinstance(function, type) or not callable(function):
        raise TypeError(
            f"{gate.name}: {function!r} is no function. Decorate the view's function, or its method: post, get, …"
        )
    if hasattr(function, "cls") or hasattr(function, "view_class"):
        raise TypeError(
            f"{gate.name}: {function!r} is a class's view already, whose user is not known yet out here. Put "
            f"@{gate.name} below @api_view, or on the class's method."
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{gate.name}: {function!r} is a generator, which no answer can take the place of. Return a streaming "
            "response instead, or let a dependency ask (trueup.billing.frameworks.fastapi)."
        )


def _guarded(gate: Gate, view: View, load: UserLoader | None) -> Any:
    if inspect.iscoroutinefunction(load):
        raise TypeError(f"{gate.name}: {view.name} is not async, so its function for the user can't be either")

    @functools.wraps(view.function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        adapter = find_adapter(view, args, kwargs)
        user = adapter.user() if load is None else known_user(load(*args, **kwargs))
        refusal = _refusal(gate, user)
        if refusal is not None:
            return adapter.answer(refusal)
        try:
            return view.function(*args, **kwargs)
        except ANSWERED as error:
            return _answer_error(adapter, error)

    return guarded


def _guarded_async(gate: Gate, view: View, load: UserLoader | None) -> Any:
    @functools.wraps(view.function)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        adapter = find_adapter(view, args, kwargs)
        if load is None:
            user = await adapter.auser()
        else:
            found = load(*args, **kwargs)
            user = known_user(await found if inspect.isawaitable(found) else found)
        refusal = await in_thread(lambda: _refusal(gate, user))
        if refusal is not None:
            return adapter.answer(refusal)
        try:
            return await view.function(*args, **kwargs)
        except ANSWERED as error:
            return _answer_error(adapter, error)

    return guarded


def _refusal(gate: Gate, user: Any) -> Refusal | None:
    return NOT_AUTHENTICATED if user is None else gate.refusal(user)


def _answer_error(adapter: Adapter, error: TrueupError) -> Any:
    adapter.undo()
    return adapter.answer(refusal_for(error))
