"""The HTTP API and a Celery application that sends its tasks: `uvicorn --factory trueup.worker.http:create_app`."""

import asyncio
import socket
import sys
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from trueup.errors import SettingsError
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
# As uvicorn exits.
START_FAILED = 3


def create_app() -> "FastAPI":
    """Return the API for this process's settings.

    Raises `SettingsError`, for example without a key that verifies tokens, and `MissingExtraError` without [api].
    """
    require_extra("api", "The HTTP API")
    from trueup.api import app as api
    from trueup.worker.overview import read_broker

    redis_transport.register()
    celery = make_application("trueup-api")
    celery.conf.update(client_config(get_settings()))
    celery.loader.import_default_modules()
    return api.create_app(celery, partial(read_broker, celery))


def serve(settings: Settings, app: "FastAPI | None" = None) -> None:
    """Serve the API until SIGINT or SIGTERM. `app` None: call `create_app`, which may raise.

    Raises `SettingsError` if it can't listen on the address.
    """
    app = app or create_app()
    live = app.state.live
    import uvicorn

    logs.configure()
    config = uvicorn.Config(
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

    class Server(uvicorn.Server):
        """Ends the streams of open pages first: it would wait for them."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            with suppress(RuntimeError):  # the loop has ended already
                asyncio.get_running_loop().call_soon_threadsafe(live.close)

    server = Server(config)
    with listening_socket(settings.api.host, settings.api.port) as listener, suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        sys.exit(START_FAILED)


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises `SettingsError` if it can't, as when another program does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(
            f"The HTTP API can't listen on {host}:{port}: {error.strerror or error}. Nothing is served. Stop the "
            "program that listens there, or set TRUEUP_API__HOST and TRUEUP_API__PORT to a free address."
        ) from None
    # asyncio sets this only for sockets that name their protocol. Without it the body of an answer waits 40 ms for the
    # acknowledgement of the head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
