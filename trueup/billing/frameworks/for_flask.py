"""Flask views: the request is ambient."""

from importlib import import_module
from typing import Any

from trueup.billing.frameworks.adapter import View, known_user, loaded
from trueup.billing.view_guard import Refusal


class _FlaskCall:
    def user(self) -> Any:
        """Return `flask.g.user`; if the host never sets it and uses Flask-Login, that one's `current_user`."""
        flask = import_module("flask")
        if "user" in flask.g or not hasattr(flask.current_app, "login_manager"):
            return known_user(flask.g.get("user"))
        current_user = loaded("flask_login", "current_user")
        # A proxy: whose it is, is known within the request only.
        return None if current_user is None else known_user(current_user._get_current_object())

    async def auser(self) -> Any:
        return self.user()

    def answer(self, refusal: Refusal) -> Any:
        response = import_module("flask").jsonify(dict(refusal.body))
        response.status_code = refusal.status
        response.headers.update(refusal.headers)
        return response

    def undo(self) -> None:
        """Flask has no transaction of its own."""


def find(view: View, args: tuple[object, ...], kwargs: dict[str, object]) -> _FlaskCall | None:
    has_request_context = loaded("flask", "has_request_context")
    return _FlaskCall() if has_request_context is not None and has_request_context() else None
