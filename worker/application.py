"""trueup's own Celery applications: guests in whatever process imports them."""

from typing import Any

from celery import Celery

from trueup.tasks import TASK_MODULES
from trueup.tasks.applications import mark_as_guest


def make_application(name: str, **options: Any) -> Celery:
    """Return an application with trueup's tasks. `options`: further arguments of `Celery`.

    It never becomes the process's current or default application: a host's `shared_task`s would be sent to trueup's
    broker. The `celery` command makes it current where it is the one that runs. It is no Django application either,
    whatever DJANGO_SETTINGS_MODULE says, because Celery makes the first one of those the default.
    """
    app = Celery(name, set_as_current=False, fixups=[], include=list(TASK_MODULES), **options)
    mark_as_guest(app)
    return app
