"""`trueup db detach`: leave a database."""

from pathlib import Path

import click

from trueup.cli.context import servers
from trueup.cli.output import show
from trueup.database.engine import describe_database
from trueup.database.retry import retrying
from trueup.install.detach import detach as detach_all
from trueup.install.detach import plan_detach


@click.command()
@click.option(
    "--keep-history",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write runs, drifts, decisions, grants and charges to this new file first, as JSON lines.",
)
@click.option("--force", is_flag=True, help="Also while holds are open: what their tasks then spend is not recorded.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def detach(keep_history: Path | None, force: bool, yes: bool) -> None:
    """Remove trueup's triggers and its schema. The host's tables stay as they are, and can be written all the time.

    Stop the workers first: those that still run are refused from then on. Interrupted, run it again.

    \b
    Example:
      trueup db detach --keep-history history.jsonl
    """
    with servers("postgres"):
        plan = retrying(plan_detach)
        click.echo(
            f"{describe_database()}: schema trueup goes, with {plan.tables} tables of {show(plan.bytes)} bytes, and "
            f"{plan.triggers} triggers on {', '.join(plan.host_tables) or 'no table'}."
        )
        if not keep_history:
            click.echo("Its history goes too: drifts, decisions, grants and charges (--keep-history FILE keeps them).")
        if plan.open_holds:
            click.echo(f"{show(plan.open_holds)} holds are open.")
        if not yes:
            click.confirm("Remove all this?", abort=True, err=True)
        kept = detach_all(history=keep_history, force=force)
    if keep_history:
        click.echo(f"Kept in {keep_history}: {', '.join(f'{show(rows)} of {table}' for table, rows in kept.items())}.")
    click.echo("Removed: triggers and schema trueup.")
