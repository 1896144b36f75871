"""Django views of every kind, and those of Django REST framework."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trueup.billing.frameworks.adapter import View, first_instance, known_user, loaded
from trueup.billing.view_guard import NOT_AUTHENTICATED, Refusal


@dataclass(frozen=True)
class _DjangoCall:
    request: Any

    def user(self) -> Any:
        return known_user(getattr(self.request, "user", None))

    async def auser(self) -> Any:
        """Read the session where Django lets it be read: what finds the user may block, whatever the host uses."""
        return await import_module("asgiref.sync").sync_to_async(self.user)()

    def answer(self, refusal: Refusal) -> Any:
        json_response = import_module("django.http").JsonResponse
        return json_response(dict(refusal.body), status=refusal.status, headers=dict(refusal.headers))

    def undo(self) -> None:
        for connection in import_module("django.db").connections.all(initialized_only=True):
            if connection.settings_dict["ATOMIC_REQUESTS"] and connection.in_atomic_block:
                connection.set_rollback(True)


class _RestCall(_DjangoCall):
    def answer(self, refusal: Refusal) -> Any:
        """Answer as the framework does; a missing user is left to its own handlers, which know how one logs in."""
        if refusal is NOT_AUTHENTICATED:
            raise import_module("rest_framework.exceptions").NotAuthenticated
        response = import_module("rest_framework.response").Response
        return response(dict(refusal.body), status=refusal.status, headers=dict(refusal.headers))


def find(view: View, args: tuple[object, ...], kwargs: dict[str, object]) -> _DjangoCall | None:
    values = (*args, *kwargs.values())
    # REST framework's request is none of Django's: it has one.
    request = first_instance(loaded("rest_framework.request", "Request"), values)
    if request is not None:
        return _RestCall(request)
    request = first_instance(loaded("django.http", "HttpRequest"), values)
    return None if request is None else _DjangoCall(request)
