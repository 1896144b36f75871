"""`trueup page`: a login link for the live page."""

import socket

import click

from trueup.cli.options import by_option, json_option, servers
from trueup.cli.output import print_json
from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.monitoring.page_access import LINK_LIVES, make_link
from trueup.settings.settings import get_settings

CONNECT_SECONDS = 3.0


@click.command()
@by_option
@json_option
def page(by: str, as_json: bool) -> None:
    """Print a link that opens the live page in a browser on this machine, once, within ten minutes.

    The page shows balances at risk, holds, denials, drift, runs, queues and alerts, and takes a person's decisions
    about drifts in review. It is served by `trueup up` and by `trueup api`. Decisions are recorded with the name given
    by --by. An operator on another machine signs in with a token instead.

    \b
    Example:
      trueup page
      trueup page --by ann
    """
    api = get_settings().api
    _require_listener(*api.local_address)
    with servers("postgres"):
        secret = retrying(lambda connection: make_link(connection, by))
    link = f"{api.local_url}login/{secret}"
    if as_json:
        print_json({"link": link, "seconds": int(LINK_LIVES.total_seconds())})
        return
    click.echo(link)
    click.echo(
        f"Open it on this machine within {int(LINK_LIVES.total_seconds() // 60)} minutes. It works once.", err=True
    )


def _require_listener(host: str, port: int) -> None:
    """Raise `TrueupError` if no program listens at the API's address: the link would lead nowhere."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise TrueupError(
            f"No API listens on {host}:{port} ({error.strerror or error}), so there is no page to open. No link was "
            "made. Start it with `trueup up` or `trueup api`, and give this command the same settings."
        ) from None
