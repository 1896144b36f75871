"""The HTTP API and a Celery application that sends its tasks: `uvicorn --factory trueup.worker.http:create_app`."""

from typing import TYPE_CHECKING

from trueup.extras import require_extra
from trueup.settings.settings import Settings, get_settings
from trueup.worker import logs, redis_transport
from trueup.worker.application import make_application
from trueup.worker.config import client_config

if TYPE_CHECKING:
    from fastapi import FastAPI

# When the server stops, running requests may take this long.
GRACE_SECONDS = 30
# Longer than proxies keep idle connections, so that a proxy does not send a request into a closing connection.
KEEP_ALIVE_SECONDS = 75


def create_app() -> "FastAPI":
    """Return the API for this process's settings.

    Raises `SettingsError`, for example without a key that verifies tokens, and `MissingExtraError` without [api].
    """
    require_extra("api", "The HTTP API")
    from trueup.api import app as api

    redis_transport.register()
    celery = make_application("trueup-api")
    celery.conf.update(client_config(get_settings()))
    celery.loader.import_default_modules()
    return api.create_app(celery)


def serve(settings: Settings, app: "FastAPI | None" = None) -> None:
    """Serve the API until SIGINT or SIGTERM. `app` None: call `create_app`, which may raise."""
    app = app or create_app()
    import uvicorn

    logs.configure()
    uvicorn.run(
        app,
        host=settings.api.host,
        port=settings.api.port,
        log_config=None,  # logs.configure has set logging up
        access_log=False,  # /metrics counts the requests
        server_header=False,
        proxy_headers=False,  # no answer depends on a proxy
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=2048,
    )
