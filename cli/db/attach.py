"""`trueup db attach`: set up beside a host that is running."""

import click

from trueup.cli.context import servers
from trueup.cli.output import show
from trueup.database.engine import describe_database, transaction
from trueup.database.locks import LOCK_TIMEOUT_MILLISECONDS, PATIENCE_SECONDS
from trueup.database.retry import retrying
from trueup.host.mapping import quote_table
from trueup.install.attach import attach as attach_to
from trueup.install.attach import attach_script
from trueup.install.plan import AttachPlan, plan_attach, refuse_other_installation
from trueup.settings.settings import get_settings


@click.command()
@click.option("--dry-run", is_flag=True, help="Print the SQL instead, for psql. Nothing is changed.")
@click.option("--replace", is_flag=True, help="Also if trueup counts other tables here, which it then lets go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def attach(dry_run: bool, replace: bool, yes: bool) -> None:
    """Set trueup up in the database of a host that is running, in steps that are not in its way.

    Prints what it is going to do, and asks. Safe to repeat; interrupted, run it again. The gate is closed until
    everything has been built and compared with the log.

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
            # Expressions of the mapping are tried out, which takes a transaction.
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


def _lines(plan: AttachPlan) -> list[str]:
    lines = [
        f"schema trueup: {'brought to this version' if plan.tables_there else 'made'}; no lock on tables of the host",
        f"triggers on {_about(plan.log, plan.log_rows)}: "
        + ("there" if plan.log_watched else _lock(plan.log_tables[0])),
        *_partition_lines(plan),
        f"trigger on {_about(plan.subscriptions, plan.subscription_rows)}: "
        + ("there" if plan.subscriptions_watched else _lock(quote_table(plan.subscriptions))),
        (
            f"balances of all subscriptions: those that are not up to date are built from the log, {_duration(plan)};"
            " no lock but ACCESS SHARE on tables of the host, which is in no writer's way"
        ),
        "gate: open when the balances agree with the log",
        "rights needed:",
        *(f"  {right}" for right in plan.needed),
    ]
    for right, statement in plan.lacking:
        lines.append(f"this role lacks the right {right}: {statement};")
    if plan.lacking_to_work:
        lines.append("workers need more than this role has (`trueup db grants` prints how to give it):")
        lines += [f"  {right}" for right in plan.lacking_to_work]
    return lines


def _partition_lines(plan: AttachPlan) -> list[str]:
    partitions = plan.log_tables[1:]
    if not partitions:
        return []
    return [f"triggers on {len(partitions)} partitions, where there are none: each as on the log"]


def _lock(table: str) -> str:
    """Return what a trigger locks, and for how long."""
    return (
        f"made, with SHARE ROW EXCLUSIVE on {table} for some milliseconds, however many rows it has; waits up to "
        f"{LOCK_TIMEOUT_MILLISECONDS} ms for that lock, and again for {PATIENCE_SECONDS:.0f} s"
    )


def _duration(plan: AttachPlan) -> str:
    if plan.fill_seconds is None:
        return "for an unknown time (reading a sample of the log took too long)"
    return f"for about {show(max(1, round(plan.fill_seconds)))} s"


def _about(table: str, rows: int) -> str:
    return f"{table} (about {show(rows)} rows)"
