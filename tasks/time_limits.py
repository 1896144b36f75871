"""A worker's start is refused if a metered task may run longer than a heartbeat keeps its hold."""

from collections.abc import Iterable
from typing import Any

from celery import Celery, Task
from celery.signals import worker_init

from trueup.errors import SettingsError
from trueup.settings.settings import get_settings
from trueup.tasks.base import MeteredTask


def check_time_limits(tasks: Iterable[Task], default: float | None, max_seconds: int) -> None:
    """Raise `SettingsError` for a metered task whose time limit is not below `max_seconds`, the longest life of a hold.

    `default`: the application's time limit in seconds, for tasks without their own; None: there is no limit.
    """
    for task in tasks:
        limit = (task.time_limit or default) if isinstance(task, MeteredTask) else None
        if limit is not None and limit >= max_seconds:
            raise SettingsError(
                f"Metered task {task.name}: its time_limit of {limit:g} s is not below TRUEUP_HOLD_MAX_SECONDS "
                f"({max_seconds} s), the longest time for which a hold is kept. The task could outlive its hold, so "
                "the worker was not started. Lower the time limit, or raise the setting."
            )


def _check_before_start(sender: Any, **_signal: Any) -> None:
    app: Celery = sender.app
    try:
        check_time_limits(app.tasks.values(), app.conf.task_time_limit, get_settings().hold_max_seconds)
    except SettingsError as error:
        raise SystemExit(str(error)) from None  # Celery logs any other error of a signal's receiver, and goes on


worker_init.connect(_check_before_start, weak=False, dispatch_uid=__name__)
