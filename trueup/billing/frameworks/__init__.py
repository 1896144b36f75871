"""Adapters: where a web framework keeps the user, and how it says no. None is imported unless the host has loaded it.

An adapter is found by the view's own arguments when the view is called, so that one decorator serves all frameworks.
"""

from trueup.billing.frameworks import for_django, for_flask, for_starlette
from trueup.billing.frameworks.adapter import Adapter, View

__all__ = ["Adapter", "View", "find_adapter"]


def find_adapter(view: View, args: tuple[object, ...], kwargs: dict[str, object]) -> Adapter:
    """Return the adapter for a call of the view. Raises TypeError when no request is in sight."""
    for framework in (for_django, for_starlette, for_flask):
        adapter: Adapter | None = framework.find(view, args, kwargs)
        if adapter is not None:
            return adapter
    raise TypeError(
        f"{view.name}: there is no request to take the user from. Give the view a parameter `request` (Django, "
        "Starlette; in FastAPI `request: Request`, or `user` with a Depends), or run it within a request (Flask)."
    )
