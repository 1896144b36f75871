"""Celery tasks, thin: parse, pass the gate, call one service of `ai` or `billing`, return a typed result.

`metered_task` is the base for AI tasks; a host decorates its own with it.
"""

from tasks import queues as queues  # whoever sends a task has its message say when
from tasks.base import MeteredTask
from tasks.metered import metered_task

# Autodiscovery finds nothing in a package named "tasks", so an app lists these under `include`.
TASK_MODULES = (
    "tasks.qa",
    "tasks.products",
    "tasks.instagram",
    "tasks.messages",
    "tasks.questions",
    "tasks.prompts",
    "tasks.upkeep",
    "tasks.reconcile",
    "tasks.alerts",
)

__all__ = ["TASK_MODULES", "MeteredTask", "metered_task"]
