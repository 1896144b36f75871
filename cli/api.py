"""`trueup api`: the HTTP API in the foreground."""

import click

from trueup.cli.context import servers
from trueup.extras import require_extra
from trueup.settings.settings import get_settings
from trueup.worker.http import serve


@click.command()
def api() -> None:
    """Serve the HTTP API in the foreground, until Ctrl-C.

    It needs a key to check tokens with: TRUEUP_API__JWT_SECRET, TRUEUP_API__JWKS_FILE or TRUEUP_API__JWKS_URL; or, on
    this machine alone, TRUEUP_API__DEMO=true. `trueup up` serves it too, when there is one. It needs the extra [api].
    Without a running stack the embedded servers run for as long as this takes.

    \b
    Example:
      TRUEUP_API__DEMO=true trueup api
      curl -H "Authorization: Bearer 1" http://127.0.0.1:8000/api/accounts/overview
    """
    require_extra("api", "`trueup api`")
    with servers("postgres", "redis"):
        serve(get_settings())
