"""`trueup up`: database, Redis, workers and beat in the foreground."""

import click

from trueup.database.engine import connect, dispose_engine, transaction
from trueup.errors import NotInstalledError
from trueup.extras import require_extra
from trueup.install.install import check_installed, install
from trueup.settings.settings import get_settings
from trueup.stack import StackUrls
from trueup.worker.http import listening_socket


@click.command()
def up() -> None:
    """Run database, Redis, workers and beat in the foreground, with one log, until Ctrl-C.

    The HTTP API too, when it has a key to check tokens with (see `trueup api --help`).

    Servers whose URL is set are used as they are. The others run embedded, in TRUEUP_HOME, and keep their data; an
    embedded database is set up by itself, host tables included. It needs the extra [embedded].

    \b
    Example:
      trueup up
    """
    require_extra("embedded", "`trueup up`", "psutil")
    from trueup.stack.supervisor.supervisor import run_stack, serves_api

    settings = get_settings()
    if serves_api(settings):
        # Found by the API's own process, it would end the whole stack after several tries.
        listening_socket(settings.api.host, settings.api.port).close()
    run_stack(settings, before_commands=_prepare_database)


def _prepare_database(urls: StackUrls) -> None:
    """Set the embedded database up; one of the user's own is only looked at."""
    settings = get_settings()
    try:
        if settings.database_url is None:
            with transaction() as connection:
                install(connection, settings.host, with_host_tables=True)
        else:
            with connect() as connection:
                check_installed(connection)
    except NotInstalledError as error:
        click.echo(f"Warning: {error} Until then every AI task waits.", err=True)
    finally:
        # The workers have connections of their own; this process needs none any more.
        dispose_engine()
