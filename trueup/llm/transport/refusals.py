"""Errors of trueup that pass through the makers' SDKs unchanged, after one attempt."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from trueup.errors import TrueupError

# An SDK retries after an error of its HTTP client, or hides it behind one of its own, but passes its own errors on.
_SDK_ERRORS = (("openai", "OpenAIError"), ("anthropic", "AnthropicError"))


@contextmanager
def passing_through_sdks() -> Iterator[None]:
    """Make an error of trueup in the block an error of each SDK that is loaded, too."""
    try:
        yield
    except TrueupError as error:
        kinds = _loaded_errors()
        if not all(isinstance(error, kind) for kind in kinds):
            error.__class__ = _combined(type(error), kinds)  # type: ignore[arg-type]
        raise


def restore(error: TrueupError) -> None:
    """Make an error of trueup that has passed through an SDK trueup's alone."""
    error.__class__ = _plain(type(error))


def _loaded_errors() -> tuple[type[Exception], ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in _SDK_ERRORS)
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


@lru_cache(maxsize=64)
def _combined(own: Any, kinds: tuple[type[Exception], ...]) -> type[TrueupError]:
    """Return a class that is trueup's error and each SDK's. It has trueup's name, and is pickled so."""
    missing = tuple(kind for kind in kinds if not issubclass(own, kind))
    plain = _plain(own)

    def __reduce__(self: TrueupError) -> tuple[object, ...]:  # noqa: N807 - the method of that name
        return plain, self.args

    combined: type[TrueupError] = type(
        plain.__name__,
        (own, *missing),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "__reduce__": __reduce__,
            "__sdk_errors__": kinds,
        },
    )
    return combined


def _plain(kind: type[TrueupError]) -> type[TrueupError]:
    """Return trueup's own class of an error that may be an SDK's, too."""
    return next(found for found in kind.__mro__ if "__sdk_errors__" not in vars(found))
