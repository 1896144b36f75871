"""trueup's own Celery applications. They change nothing in a process that imports them."""

from typing import Any

from celery import Celery

from trueup.tasks import TASK_MODULES
from trueup.tasks.applications import mark_as_guest


def make_application(name: str, **options: Any) -> Celery:
    """Return an application with trueup's tasks. `options`: more arguments of `Celery`.

    It never becomes the current or default application of the process, because then a host's `shared_task`s would go to
    trueup's broker. The `celery` command makes it current when it runs it. It ignores DJANGO_SETTINGS_MODULE, because
    Celery makes the first Django application the default.
    """
    app = Celery(name, set_as_current=False, fixups=[], include=list(TASK_MODULES), **options)
    mark_as_guest(app)
    return app
