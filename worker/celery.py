"""The application that `celery -A trueup.worker` finds. It reads the settings when it is first used, not at import."""

import gc
from typing import Any

from celery.signals import celeryd_after_setup

from trueup.settings.settings import get_settings
from trueup.worker import redis_transport
from trueup.worker.alive import touch_while_alive
from trueup.worker.application import make_application
from trueup.worker.config import celery_config

redis_transport.register()

app = make_application("trueup", log="trueup.worker.logs:Logging")
app.add_defaults(lambda: celery_config(get_settings()))
touch_while_alive(app)


@celeryd_after_setup.connect
def _keep_imports(instance: Any, **_: object) -> None:
    """Leave all that is imported out of garbage collection, so that the pool's processes go on sharing its memory."""
    if instance.app is app:
        gc.freeze()
