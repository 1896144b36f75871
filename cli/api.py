"""`trueup api`: serve the HTTP API in the foreground."""

import click

from trueup.cli.options import servers
from trueup.extras import require_extra
from trueup.settings.settings import get_settings
from trueup.worker.http import serve


@click.command()
def api() -> None:
    """Serve the HTTP API in the foreground, until Ctrl-C.

    The API needs a key that verifies tokens: TRUEUP_API__JWT_SECRET, TRUEUP_API__JWKS_FILE or TRUEUP_API__JWKS_URL; or,
    on loopback only, TRUEUP_API__DEMO=true. With a key, `trueup up` serves it too. It needs the extra [api]. Without a
    running stack, the embedded servers run as long as the command.

    \b
    Example:
      TRUEUP_API__DEMO=true trueup api
      curl -H "Authorization: Bearer 1" http://127.0.0.1:8000/api/accounts/overview
    """
    require_extra("api", "`trueup api`")
    with servers("postgres", "redis"):
        serve(get_settings())
