"""`trueup db`: set the database up."""

import click

from trueup.cli.context import servers
from trueup.cli.db.attach import attach
from trueup.cli.db.detach import detach
from trueup.cli.db.discover import discover
from trueup.database import engine as database
from trueup.database.retry import retrying
from trueup.database.session import SEARCH_PATH
from trueup.install.install import install
from trueup.install.plan import refuse_other_installation
from trueup.install.roles import RoleNames, grants_sql
from trueup.settings.settings import get_settings


@click.group()
def db() -> None:
    """Set the database up.

    \b
    Example:
      trueup db init
    """


db.add_command(attach)
db.add_command(discover)
db.add_command(detach)


@db.command()
@click.option(
    "--with-host-tables",
    is_flag=True,
    help="Also create the host's tables, shaped like a Django application's, where there are none.",
)
@click.option("--replace", is_flag=True, help="Also if trueup counts other tables here, which it then lets go.")
def init(with_host_tables: bool, replace: bool) -> None:
    """Create or upgrade schema `trueup`, its functions, and the usage log's triggers. Safe to repeat.

    \b
    Example:
      trueup db init
      trueup db init --with-host-tables     # for an empty database
    """
    with servers("postgres"):
        with database.transaction() as connection:
            if not replace:
                refuse_other_installation(connection, get_settings().host)
            done = install(connection, get_settings().host, with_host_tables=with_host_tables)
        where = database.describe_database()
    click.echo(f"Ready: {', '.join(done)} in {where}.")


@db.command()
@click.option("--migrate-role", default=RoleNames.migrate, show_default=True, help="Who sets the database up.")
@click.option("--worker-role", default=RoleNames.worker, show_default=True, help="Whose the workers and the API are.")
@click.option("--readonly-role", default=RoleNames.readonly, show_default=True, help="Who only looks at reports.")
def grants(migrate_role: str, worker_role: str, readonly_role: str) -> None:
    """Print the SQL that makes three roles with no more rights than they need. Nothing is changed.

    A superuser runs it, or whoever owns the database and the host's tables: before `trueup db init`, and again after
    it, for then the tables are there.

    \b
    Example:
      trueup db grants | psql app
      trueup db grants --worker-role app_worker
    """
    names = RoleNames(migrate=migrate_role, worker=worker_role, readonly=readonly_role)
    with servers("postgres"):
        statements = retrying(lambda connection: grants_sql(connection, get_settings().host, names))
        where = database.describe_database()
    click.echo(f"-- Least-privilege roles for trueup in {where}.")
    click.echo("-- They have no passwords yet; in psql: \\password ROLE")
    click.echo(f"BEGIN;\nSET LOCAL search_path = {SEARCH_PATH};\nSET LOCAL lock_timeout = '5s';")
    for statement in statements:
        click.echo(f"{statement};")
    click.echo("COMMIT;")
