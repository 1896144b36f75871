"""The application: `create_app()`. It serves the API, the live page for operators, and the addresses at `/docs`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import to_thread
from celery import Celery
from celery.app import app_or_default
from fastapi import FastAPI

from trueup.api import errors
from trueup.api.auth import Verifier
from trueup.api.limits import RateLimit
from trueup.api.middleware import Edge
from trueup.api.page import documentation
from trueup.api.page import views as page
from trueup.api.page.live import Live, ReadBroker
from trueup.api.page.rendering import Pages
from trueup.api.views import accounts, ai, drift, health, subscriptions, task_results
from trueup.api.views.metrics import Metrics
from trueup.settings.settings import get_settings

DESCRIPTION = """
A user's remaining AI tokens, counted from the usage log and never from the legacy counter; AI tasks behind the gate;
reconcile reports. Every answer has the shape of `Problem`, except a success, a denial (402) and `/readyz`.
"""


def create_app(celery: Celery | None = None, read_broker: ReadBroker | None = None) -> FastAPI:
    """Make the application from this process's settings. It opens no connection yet.

    `celery`: the application that sends the AI tasks; None: the calling thread's current one. `read_broker`: reads the
    queues and workers for the live page; None: the page does not show them. Raises `SettingsError` if no key is
    configured that tokens can be verified with.
    """
    settings = get_settings()
    app = FastAPI(
        title="trueup",
        version=version("trueup"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.verifier = Verifier(settings)
    app.state.rate_limit = RateLimit(settings)
    app.state.metrics = Metrics()
    app.state.celery = celery or app_or_default()
    app.state.watch = health.Watch(app.state.celery)
    app.state.pages = Pages(settings)
    app.state.live = Live(app.state.pages.environment, settings.host.user_id_type, read_broker)
    errors.register(app)
    for view in (accounts, subscriptions, ai, task_results, drift, health, page, documentation):
        app.include_router(view.router)
    app.include_router(health.metrics_router(public=settings.api.public_metrics))
    app.add_middleware(Edge, settings=settings.api, metrics=app.state.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    to_thread.current_default_thread_limiter().total_tokens = app.state.settings.api.threads
    await to_thread.run_sync(accounts.check_columns)
    yield
    app.state.live.close()
