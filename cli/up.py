"""`trueup up`: run database, Redis, workers and beat in the foreground."""

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

    It ends with "ready:" and the address of the live page. The HTTP API needs a key that verifies tokens too (see
    `trueup api --help`); without one the page is for this machine alone.

    It uses the servers whose URL is set. The others run embedded in TRUEUP_HOME and keep their data. It sets up an
    embedded database, host tables included. It needs the extra [embedded].

    \b
    Example:
      trueup up
    """
    require_extra("embedded", "`trueup up`", "psutil")
    from trueup.stack.supervisor import run_stack

    settings = get_settings()
    run_stack(
        settings,
        # The page alone is left out where its address is in use.
        before_servers=_check_api_address if settings.api.has_key or settings.api.demo else None,
        before_commands=_prepare_database,
    )


def _check_api_address() -> None:
    """Raise `SettingsError` if the API can't listen. Its own process would fail again and again, and end the stack."""
    api = get_settings().api
    listening_socket(api.host, api.port).close()


def _prepare_database(urls: StackUrls) -> None:
    """Set the embedded database up. A database with a URL is only checked."""
    settings = get_settings()
    try:
        if settings.database_url is None:
            with transaction() as connection:
                install(connection, settings.host, with_host_tables=True)
        else:
            with connect() as connection:
                check_installed(connection)
    except NotInstalledError as error:
        click.echo(f"Warning: {error} Until then AI tasks wait.", err=True)
    finally:
        # This process needs no connections any more; each worker opens its own.
        dispose_engine()
