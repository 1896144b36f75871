"""`trueup drift`: reports of what reconciling found."""

import click

from billing import db
from billing.drift_reports import read_report
from billing.errors import TrueupError
from billing.settings import get_settings
from cli.context import servers
from cli.report import FORMATS, print_report


@click.group()
def drift() -> None:
    """Reports of what reconciling found.

    \b
    Example:
      trueup drift report
    """


@drift.command()
@click.option("--run", "run_id", type=click.IntRange(min=1), help="A run's number; by default the newest.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to show it."
)
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def report(run_id: int | None, form: str) -> None:
    """Show what a reconcile run found, corrected, and left to a person.

    \b
    Example:
      trueup drift report
      trueup drift report --run 7 --format csv > drift.csv
    """
    with servers("postgres"), db.connect() as connection:
        found = read_report(connection, get_settings().host.user_id_type, run_id)
    if found is None:
        raise TrueupError("There has been no reconcile run yet. Start one with `trueup reconcile`.")
    print_report(found, form)
