"""`trueup db`: set a database up, attach trueup to a host, or detach it."""

from pathlib import Path

import click

from trueup.cli import SuggestingGroup
from trueup.cli.db.discover import discover
from trueup.cli.options import servers
from trueup.cli.output import show
from trueup.database.engine import describe_database, transaction
from trueup.database.locks import LOCK_TIMEOUT_MILLISECONDS, PATIENCE_SECONDS
from trueup.database.retry import retrying
from trueup.database.session import SEARCH_PATH
from trueup.host.mapping import quote_table
from trueup.install.attach import attach as attach_to
from trueup.install.attach import attach_script
from trueup.install.detach import detach as detach_all
from trueup.install.detach import plan_detach
from trueup.install.install import install
from trueup.install.plan import AttachPlan, plan_attach, refuse_other_installation
from trueup.install.rights import RoleNames, grants_sql
from trueup.settings.settings import get_settings

replace_option = click.option(
    "--replace", is_flag=True, help="Continue if trueup counts other tables here. It then stops counting them."
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


@click.group(cls=SuggestingGroup)
def db() -> None:
    """Set the database up, attach trueup to a host, or detach it.

    \b
    Example:
      trueup db init
    """


db.add_command(discover)


@db.command()
@click.option(
    "--with-host-tables",
    is_flag=True,
    help="Also create missing tables of the host, with the columns of a Django application.",
)
@replace_option
def init(with_host_tables: bool, replace: bool) -> None:
    """Create or upgrade the schema `trueup`, its functions, and the triggers on the usage log. Safe to repeat.

    \b
    Example:
      trueup db init
      trueup db init --with-host-tables     # for an empty database
    """
    with servers("postgres"):
        with transaction() as connection:
            if not replace:
                refuse_other_installation(connection, get_settings().host)
            done = install(connection, get_settings().host, with_host_tables=with_host_tables)
        where = describe_database()
    click.echo(f"Ready: {', '.join(done)} in {where}.")


@db.command()
@click.option("--dry-run", is_flag=True, help="Print the SQL for psql. Nothing is changed.")
@replace_option
@yes_option
def attach(dry_run: bool, replace: bool, yes: bool) -> None:
    """Set trueup up in the database of a running host, in steps that do not block the host.

    It prints its plan and asks for confirmation. It is safe to repeat: after an interruption, run it again. The gate
    stays closed until all balances are built and compared with the log.

    \b
    Example:
      trueup db attach
      trueup db attach --dry-run > attach.sql
    """
    mapping = get_settings().host
    with servers("postgres"):
        if not replace:
            retrying(lambda connection: refuse_other_installation(connection, mapping))
        if dry_run:
            # The script tests expressions of the mapping, which needs a transaction.
            with transaction() as connection:
                script = attach_script(connection, mapping)
            click.echo(script, nl=False)
            return
        plan = retrying(lambda connection: plan_attach(connection, mapping))
        click.echo(f"{describe_database()}:")
        for line in _lines(plan):
            click.echo(f"  {line}")
        if not yes:
            click.confirm("Do this?", abort=True, err=True)
        attach_to(mapping, report=click.echo)


@db.command()
@click.option(
    "--keep-history",
    type=click.Path(dir_okay=False, path_type=Path),
    help="First write runs, drifts, decisions, grants and charges to this new file, as JSON lines.",
)
@click.option(
    "--force", is_flag=True, help="Continue although holds are open. Their tasks' later usage is not recorded."
)
@yes_option
def detach(keep_history: Path | None, force: bool, yes: bool) -> None:
    """Remove trueup's triggers and schema. The host's tables do not change, and the host can always write to them.

    Stop the workers first: the tasks of running workers fail afterwards. After an interruption, run it again.

    \b
    Example:
      trueup db detach --keep-history history.jsonl
    """
    with servers("postgres"):
        plan = retrying(plan_detach)
        click.echo(
            f"{describe_database()}: removes schema trueup with {plan.tables} tables ({show(plan.bytes)} bytes) and "
            f"{plan.triggers} triggers on {', '.join(plan.host_tables) or 'no table'}."
        )
        if not keep_history:
            click.echo("The history goes too: drifts, decisions, grants, charges (--keep-history FILE saves it).")
        if plan.open_holds:
            click.echo(f"{show(plan.open_holds)} holds are open.")
        if not yes:
            click.confirm("Remove all of this?", abort=True, err=True)
        kept = detach_all(history=keep_history, force=force)
    if keep_history:
        click.echo(f"Saved to {keep_history}: {', '.join(f'{show(rows)} of {table}' for table, rows in kept.items())}.")
    click.echo("Removed the triggers and the schema trueup.")


@db.command()
@click.option("--migrate-role", default=RoleNames.migrate, show_default=True, help="The role that installs trueup.")
@click.option("--worker-role", default=RoleNames.worker, show_default=True, help="The role of workers and API.")
@click.option("--readonly-role", default=RoleNames.readonly, show_default=True, help="The role that reads reports.")
def grants(migrate_role: str, worker_role: str, readonly_role: str) -> None:
    """Print the SQL that creates three roles with only the rights they need. Nothing is changed.

    Run the SQL as a superuser, or as the owner of the database and the host's tables: before `trueup db init`, and
    again after it, when trueup's tables exist.

    \b
    Example:
      trueup db grants | psql app
      trueup db grants --worker-role app_worker
    """
    names = RoleNames(migrate=migrate_role, worker=worker_role, readonly=readonly_role)
    with servers("postgres"):
        statements = retrying(lambda connection: grants_sql(connection, get_settings().host, names))
        where = describe_database()
    click.echo(f"-- Least-privilege roles for trueup in {where}.")
    click.echo("-- They have no passwords yet; in psql: \\password ROLE")
    click.echo(f"BEGIN;\nSET LOCAL search_path = {SEARCH_PATH};\nSET LOCAL lock_timeout = '5s';")
    for statement in statements:
        click.echo(f"{statement};")
    click.echo("COMMIT;")


def _lines(plan: AttachPlan) -> list[str]:
    partitions = len(plan.log_tables) - 1
    lines = [
        f"schema trueup: {'upgrade' if plan.tables_there else 'create'}; no lock on the host's tables",
        f"triggers on {_about(plan.log, plan.log_rows)}: "
        + ("exist" if plan.log_watched else _lock(plan.log_tables[0])),
        *([f"missing triggers on {partitions} partitions: create each as on the log"] if partitions else []),
        f"trigger on {_about(plan.subscriptions, plan.subscription_rows)}: "
        + ("exists" if plan.subscriptions_watched else _lock(quote_table(plan.subscriptions))),
        (
            f"balances of all subscriptions: build missing and outdated balances from the log, {_duration(plan)}; "
            "takes only ACCESS SHARE on the host's tables, which blocks no writer"
        ),
        "gate: opens when the balances equal the log",
        "rights needed:",
        *(f"  {right}" for right in plan.needed),
    ]
    if plan.host_triggers:
        lines.append("triggers of the host's that may change the counter or the log:")
        lines += [f"  {trigger}" for trigger in plan.host_triggers]
    lines += [f"question: {question}" for question in plan.questions]
    for right, statement in plan.lacking:
        lines.append(f"this role lacks the right {right}; run: {statement};")
    if plan.lacking_to_work:
        lines.append("rights that workers need and this role lacks (`trueup db grants` prints the SQL):")
        lines += [f"  {right}" for right in plan.lacking_to_work]
    return lines


def _lock(table: str) -> str:
    """Return the lock for creating a trigger, and its duration."""
    return (
        f"create, with SHARE ROW EXCLUSIVE on {table} for some milliseconds, independent of its rows; waits at most "
        f"{LOCK_TIMEOUT_MILLISECONDS} ms for the lock, and retries for {PATIENCE_SECONDS:.0f} s"
    )


def _duration(plan: AttachPlan) -> str:
    if plan.fill_seconds is None:
        return "in an unknown time (reading a sample of the log took too long)"
    return f"in about {show(max(1, round(plan.fill_seconds)))} s"


def _about(table: str, rows: int) -> str:
    return f"{table} (about {show(rows)} rows)"
