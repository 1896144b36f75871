"""The shape of a task's body: which callables can be one, how their type hints are read, and how they are called."""

import functools
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, get_type_hints

from celery import Task

from trueup.tasks.event_loop import run_async

_MODEL_TYPES = frozenset(("AsyncModel", "MeteredModel", "Model"))


def check_body(body: Any, *, named: bool) -> None:
    """Raise TypeError for a body that would pass the gate and then not run, or not be found.

    `named`: the task has the option `name`. A body without a name of its own, such as a partial, needs it.
    """
    if isinstance(body, type) or not callable(body):
        raise TypeError(f"metered_task: {body!r} is not a function. Decorate a function or a coroutine function.")
    code = _code_of(body)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise TypeError(
            f"metered_task: {name_of(body)} is a generator function. A task has one result, and a call of a generator "
            "function runs none of its code. Return a list instead, or stream from a view (stream_with_tokens)."
        )
    if not named and not hasattr(body, "__name__"):
        raise TypeError(f"metered_task: {body!r} has no name for the task. Give the option name=…")


def call_body(body: Callable[..., Any], task: Task, /, *args: Any, **kwargs: Any) -> Any:
    """Run the body of `task` and return its result. A coroutine function runs on this process's event loop."""
    if inspect.iscoroutinefunction(_code_of(body)):
        return run_async(body(*args, **kwargs), task)
    return body(*args, **kwargs)


def check_result(result: Any, task_name: str) -> Any:
    """Return a body's result. Raises TypeError for an object whose work has not run and will not."""
    if not isinstance(result, (Awaitable, Iterator, AsyncIterator)):
        return result
    if inspect.iscoroutine(result):
        result.close()  # or Python warns later that it was never awaited
    raise TypeError(
        f"The body of {task_name} returned {type(result).__name__!r}, an object whose work has not run. The task "
        "failed; model calls that the body has made are charged. Declare the body `async def` and await the work, or "
        "return a list of the items."
    )


def takes_model(body: Callable[..., Any]) -> bool:
    """Return whether the body's first parameter is the model client: it is called `model`, or its hint is one's type.

    A first parameter `model` with another hint, such as `str`, is an argument of the caller's.
    """
    first = next(iter(signature_of(body).parameters.values()), None)
    if first is None:
        return False
    hint = first.annotation
    named = hint if isinstance(hint, str) else getattr(hint, "__forward_arg__", getattr(hint, "__name__", ""))
    if named.strip("\"'").rpartition(".")[2] in _MODEL_TYPES:
        return True
    return first.name == "model" and (hint is first.empty or hint is Any or named == "Any")


def name_of(body: Any) -> str:
    """Return the name of a body for messages: of a partial its function's, of an object with `__call__` its class's."""
    if isinstance(body, functools.partial):
        return name_of(body.func)
    return str(getattr(body, "__qualname__", None) or type(body).__qualname__)


def signature_of(body: Callable[..., Any]) -> inspect.Signature:
    """Return the body's signature. Its hints may be strings: `resolved_hint` reads them."""
    if sys.version_info >= (3, 14):
        return inspect.signature(body, annotation_format=import_module("annotationlib").Format.FORWARDREF)
    return inspect.signature(body)


def resolved_hint(body: Any, parameter: inspect.Parameter) -> Any:
    """Return the type that a parameter's hint names; Any without a hint.

    Each hint is read on its own, so that hints of parameters that the caller does not pass may name what is imported
    for type checkers only. Raises TypeError for a hint that can't be resolved.
    """
    if parameter.annotation is parameter.empty:
        return Any
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    names = getattr(inspect.unwrap(_code_of(body)), "__globals__", {})
    try:
        return get_type_hints(holder, globalns=names, include_extras=True)[parameter.name]
    except Exception as error:
        hint = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)
        raise TypeError(
            f"{name_of(body)}: the type hint {hint!r} of parameter `{parameter.name}` can't be resolved ({error}). "
            "Arguments are parsed by their hints. Import the name at the top of the module, outside of "
            "`if TYPE_CHECKING`."
        ) from error


def _code_of(body: Any) -> Any:
    """Return the function that runs when the body is called."""
    while isinstance(body, functools.partial):
        body = body.func
    if inspect.isroutine(body):
        return body
    return type(body).__call__
