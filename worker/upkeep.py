"""trueup's upkeep in a host's own Celery application."""

from importlib import import_module
from typing import Any

from celery import Celery
from celery.signals import import_modules

from trueup.settings.settings import get_settings
from trueup.worker.config import beat_schedule

_MODULES = ("trueup.tasks.upkeep", "trueup.tasks.alerts")


def add_upkeep(app: Celery, *, queue: str | None = None) -> None:
    """Have the application's worker and beat do trueup's upkeep: reconcile, expire holds, prune, send alerts.

    Call it where the application is made. The tasks and beat's entries are added when a worker or beat loads its
    modules. An entry of the same name in `beat_schedule` is kept.

    `queue`: for the messages of beat. None: the application's own routes decide.
    """

    def add(sender: Any, **_: Any) -> None:
        if sender is not app:
            return
        for module in _MODULES:
            import_module(module)
        entries = beat_schedule(get_settings())
        for entry in entries.values():
            del entry["options"]["queue"]
            if queue is not None:
                entry["options"]["queue"] = queue
        own = app.conf.beat_schedule or {}
        app.conf.beat_schedule = {**{f"trueup-{name}": entry for name, entry in entries.items()}, **own}

    # After the signal's earlier receivers: one of them sets Django up, whose settings the entries may need.
    import_modules.connect(add, weak=False)
