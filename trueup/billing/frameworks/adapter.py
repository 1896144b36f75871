"""What the decorators need of a web framework."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trueup.billing.view_guard import Refusal
from trueup.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class View:
    """A decorated view. `name`: for messages."""

    function: Callable[..., Any]
    name: str


class Adapter(Protocol):
    """One call of a view, as its framework sees it."""

    def user(self) -> Any:
        """Return the request's user; None without one."""
        ...

    async def auser(self) -> Any:
        """Return the request's user in an async view; None without one."""
        ...

    def answer(self, refusal: Refusal) -> Any:
        """Return the framework's response for a refusal, or raise what makes it answer so."""
        ...

    def undo(self) -> None:
        """Have the framework roll back what the view has done, as for an error that leaves it."""
        ...


UserLoader = Callable[..., Any]


def loaded(module: str, name: str) -> Any:
    """Return an attribute of a module if the host has it loaded, else None."""
    return getattr(sys.modules.get(module), name, None)


def first_instance(kind: Any, values: Iterable[object]) -> Any:
    """Return the first value of that class; None without one, or when its class is not loaded."""
    return None if kind is None else next((value for value in values if isinstance(value, kind)), None)


def known_user(user: Any) -> Any:
    """Return a user as `user_ids.user_id_of` takes it: None for an anonymous one, the id of claims or a row.

    Raises `InvalidInputError` for a dict whose `id` and `user_id` differ: one of them is somebody else's.
    """
    if user is None or not getattr(user, "is_authenticated", True):
        return None
    if isinstance(user, Mapping):
        ids = {key: user[key] for key in ("id", "user_id") if user.get(key) is not None}
        if len(set(map(str, ids.values()))) > 1:
            raise InvalidInputError(
                f"user: {ids} are two users. Say which one pays: user=…, a function that returns it"
            )
        return next(iter(ids.values()), None)
    return user
