"""`trueup db attach`: set up beside a host that is running."""

import click

from billing import db
from billing.attach import AttachPlan, plan_attach
from billing.attach import attach as attach_to
from billing.settings import get_settings
from billing.short_locks import LOCK_TIMEOUT_MILLISECONDS, PATIENCE_SECONDS
from cli.context import servers
from cli.output import show


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def attach(yes: bool) -> None:
    """Set trueup up in the database of a host that is running, in steps that are not in its way.

    Prints what it is going to do, and asks. Safe to repeat; interrupted, run it again. The gate is closed until
    everything has been built and compared with the log.

    \b
    Example:
      trueup db attach
    """
    mapping = get_settings().host
    with servers("postgres"):
        plan = db.retrying(lambda connection: plan_attach(connection, mapping))
        click.echo(f"{db.describe_database()}:")
        for line in _lines(plan):
            click.echo(f"  {line}")
        if not yes:
            click.confirm("Do this?", abort=True, err=True)
        attach_to(mapping, tell=click.echo)


def _lines(plan: AttachPlan) -> list[str]:
    limits = f"made; waits up to {LOCK_TIMEOUT_MILLISECONDS} ms for its lock, and again for {PATIENCE_SECONDS:.0f} s"
    return [
        f"schema trueup: {'brought to this version' if plan.tables_there else 'made'}; no lock on tables of the host",
        f"triggers on {_about(plan.log, plan.log_rows)}: {'there' if plan.log_watched else limits}",
        f"trigger on {_about(plan.subscriptions, plan.subscription_rows)}: "
        + ("there" if plan.subscriptions_watched else limits),
        "balances of all subscriptions: those that are not up to date are built from the log; no lock on it",
        "gate: open when the balances agree with the log",
        *(f"this role lacks the right {right} (`trueup db grants` prints how to give it)" for right in plan.lacking),
    ]


def _about(table: str, rows: int) -> str:
    return f"{table} (about {show(rows)} rows)"
