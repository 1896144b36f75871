"""The application that `celery -A trueup.worker` finds. It reads the settings when it is first used, not at import."""

from trueup.settings.settings import get_settings
from trueup.worker import redis_transport
from trueup.worker.alive import touch_while_alive
from trueup.worker.application import make_application
from trueup.worker.config import celery_config

redis_transport.register()

app = make_application("trueup", log="trueup.worker.logs:Logging")
app.add_defaults(lambda: celery_config(get_settings()))
touch_while_alive(app)
