"""Celery tasks, thin: parse, pass the gate, call one service of a room below, return a typed result.

`metered_task` is the base for AI tasks; a host decorates its own with it.
"""

if not __name__.startswith("trueup."):
    raise ImportError(
        "This folder is the package trueup.tasks. Imported as tasks, its code would run a second time. "
        "Nothing was imported. Import trueup.tasks."
    )

from trueup.extras import missing_modules
from trueup.tasks import queues as queues  # whoever sends a task has its message say when
from trueup.tasks.base import MeteredTask
from trueup.tasks.metered import metered_task

# The AI tasks of the specification. They need the extra [features], and are not registered without it.
FEATURE_TASK_MODULES = (
    "trueup.tasks.features.qa",
    "trueup.tasks.features.products",
    "trueup.tasks.features.instagram",
    "trueup.tasks.features.messages",
    "trueup.tasks.features.questions",
    "trueup.tasks.features.prompts",
)
# Autodiscovery finds nothing in a package named "tasks", so an app lists these under `include`.
TASK_MODULES = (
    *(() if missing_modules("features") else FEATURE_TASK_MODULES),
    "trueup.tasks.upkeep",
    "trueup.tasks.reconcile",
    "trueup.tasks.alerts",
)

__all__ = ["FEATURE_TASK_MODULES", "TASK_MODULES", "MeteredTask", "metered_task"]
