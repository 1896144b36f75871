"""`trueup db`: set the database up."""

import click

from billing import db as database
from billing.install import install
from billing.settings import get_settings
from cli.context import servers


@click.group()
def db() -> None:
    """Set the database up.

    \b
    Example:
      trueup db init
    """


@db.command()
@click.option(
    "--with-host-tables",
    is_flag=True,
    help="Also create the host's tables, shaped like a Django application's, where there are none.",
)
def init(with_host_tables: bool) -> None:
    """Create or upgrade schema `trueup`, its functions, and the usage log's triggers. Safe to repeat.

    \b
    Example:
      trueup db init
      trueup db init --with-host-tables     # for an empty database
    """
    with servers("postgres"):
        with database.transaction() as connection:
            done = install(connection, get_settings().host, with_host_tables=with_host_tables)
        where = database.describe_database()
    click.echo(f"Ready: {', '.join(done)} in {where}.")
