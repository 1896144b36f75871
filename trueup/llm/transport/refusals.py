"""Errors that pass through the makers' SDKs unchanged, after one attempt: trueup's, and the end of a task's time."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from trueup.errors import TrueupError

# An SDK retries after an error of its HTTP client, or hides it behind one of its own, but passes its own errors on.
_SDK_ERRORS = (("openai", "OpenAIError"), ("anthropic", "AnthropicError"))
# Celery raises it in the middle of whatever the task does.
_TIME_LIMIT = (("billiard.exceptions", "SoftTimeLimitExceeded"),)


@contextmanager
def passing_through_sdks() -> Iterator[None]:
    """Make an error in the block that must reach the task's body an error of each SDK that is loaded, too."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (TrueupError, *_loaded(_TIME_LIMIT))):
            kinds = _loaded(_SDK_ERRORS)
            if not all(isinstance(error, kind) for kind in kinds):
                error.__class__ = _combined(type(error), kinds)  # type: ignore[arg-type]
        raise


@contextmanager
def restored() -> Iterator[None]:
    """Make an error that has passed through an SDK in the block one of its own class alone."""
    try:
        yield
    except Exception as error:
        own = _own(type(error))
        if own is not type(error):
            error.__class__ = own
        raise


def _loaded(errors: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in errors)
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


@lru_cache(maxsize=64)
def _combined(kind: Any, sdks: tuple[type[Exception], ...]) -> type[Exception]:
    """Return a class that is the error's own and each SDK's. It has the own one's name, and is pickled so."""
    missing = tuple(sdk for sdk in sdks if not issubclass(kind, sdk))
    own = _own(kind)

    def __reduce__(self: Exception) -> tuple[object, ...]:  # noqa: N807 - the method of that name
        return own, self.args

    return type(
        own.__name__,
        (kind, *missing),
        {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "__reduce__": __reduce__,
            "__sdk_errors__": sdks,
        },
    )


def _own(kind: type[Exception]) -> Any:
    """Return the class of an error before it was combined."""
    return next(found for found in kind.__mro__ if "__sdk_errors__" not in vars(found))
