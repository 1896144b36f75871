"""The application that `celery -A trueup.worker` finds. Settings are read when it is first used, not at import."""

from typing import Any

from celery import Celery

from trueup.settings.settings import get_settings
from trueup.tasks import TASK_MODULES
from trueup.worker import logs, redis_transport
from trueup.worker.config import celery_config


def _defaults() -> dict[str, Any]:
    return celery_config(get_settings())


redis_transport.register()
logs.connect()

app = Celery("trueup", include=list(TASK_MODULES))
app.add_defaults(_defaults)
