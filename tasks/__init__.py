"""Celery tasks. Each one parses its arguments, passes the gate, calls one service and returns a typed result.

`metered_task` makes an AI task; a host decorates its own functions with it.
"""

if not __name__.startswith("trueup."):
    raise ImportError(
        "This folder is the package trueup.tasks. Imported as tasks, its code would run a second time. "
        "Nothing was imported. Import trueup.tasks."
    )

from trueup.extras import missing_modules
from trueup.tasks import pools as pools  # its import registers the handler that refuses pools of greenlets
from trueup.tasks import queues as queues  # its import registers the handler that stamps messages with their send time
from trueup.tasks import time_limits as time_limits  # its import registers the check of a worker's tasks
from trueup.tasks.base import MeteredTask
from trueup.tasks.metered import metered_task

# The specification's AI tasks. They are registered only if the extra [features] is installed.
FEATURE_TASK_MODULES = (
    "trueup.tasks.features.qa",
    "trueup.tasks.features.products",
    "trueup.tasks.features.instagram",
    "trueup.tasks.features.messages",
    "trueup.tasks.features.questions",
    "trueup.tasks.features.prompts",
)
# Celery's autodiscovery finds nothing in a package named "tasks", so an application lists these under `include`.
TASK_MODULES = (
    *(() if missing_modules("features") else FEATURE_TASK_MODULES),
    "trueup.tasks.upkeep",
    "trueup.tasks.reconcile",
    "trueup.tasks.alerts",
)

__all__ = ["FEATURE_TASK_MODULES", "TASK_MODULES", "MeteredTask", "metered_task"]
