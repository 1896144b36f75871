"""`celery -A proj trueup …`: trueup's commands inside the project's own Celery application.

Celery finds the command by the entry point group `celery.commands` and passes its application in `ctx.obj`.
"""

import os
from contextlib import suppress

import click

from trueup.cli import LazyGroup, main
from trueup.errors import SettingsError

REDIS_SCHEMES = ("redis://", "rediss://", "redis+socket://")


class ApplicationGroup(LazyGroup):
    """trueup's commands, run once the project's application and its tasks are loaded."""

    def invoke(self, ctx: click.Context) -> object:
        app = ctx.obj.app
        # `shared_task` and `current_app` mean this application, also where the project did not make it current.
        app.set_current()
        # Celery loads the project's tasks only when it needs them; Django is set up by the same signal.
        app.loader.import_default_modules()
        _use_broker_of_application(app.conf.broker_url)
        return super().invoke(ctx)


def _use_broker_of_application(url: str | None) -> None:
    """Let trueup's settings name the application's Redis, unless they name a broker themselves."""
    from trueup.settings.settings import PREFIX, get_settings

    # A wrong setting is the command's to report.
    with suppress(SettingsError):
        if url and url.startswith(REDIS_SCHEMES) and get_settings().broker_url is None:
            os.environ[f"{PREFIX}BROKER_URL"] = url
            get_settings.cache_clear()


# Celery names the subcommand by the click command, not by the entry point.
trueup = ApplicationGroup(
    "trueup", callback=main.callback, params=main.params, help=main.help, context_settings=main.context_settings
)
