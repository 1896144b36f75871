"""`celery -A proj trueup …`: trueup's commands with the project's own Celery application.

Celery finds the command by the entry point group `celery.commands`, and passes the application in `ctx.obj`.
"""

import os
from contextlib import suppress

import click

from trueup.cli import LazyGroup, main
from trueup.errors import SettingsError

REDIS_SCHEMES = ("redis://", "rediss://", "redis+socket://")


class ApplicationGroup(LazyGroup):
    """trueup's commands. They run after the project's application and its tasks are loaded."""

    def invoke(self, ctx: click.Context) -> object:
        app = ctx.obj.app
        # `shared_task` and `current_app` then use this application, even if the project did not make it current.
        app.set_current()
        # Celery loads the project's tasks only on demand. The same signal sets Django up.
        app.loader.import_default_modules()
        _use_broker_of_application(app.conf.broker_url)
        return super().invoke(ctx)


def _use_broker_of_application(url: str | None) -> None:
    """Use the application's Redis as trueup's broker, unless trueup's settings name a broker."""
    from trueup.settings.settings import PREFIX, get_settings

    # The command reports a wrong setting.
    with suppress(SettingsError):
        if url and url.startswith(REDIS_SCHEMES) and get_settings().broker_url is None:
            os.environ[f"{PREFIX}BROKER_URL"] = url
            get_settings.cache_clear()


# Celery takes the name of the subcommand from the click command, not from the entry point.
trueup = ApplicationGroup(
    "trueup", callback=main.callback, params=main.params, help=main.help, context_settings=main.context_settings
)
