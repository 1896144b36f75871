"""`trueup drift`: drift reports, the history of runs, the explanation of a counter, and the review queue."""

import click

from trueup.accounts.user_ids import UserId
from trueup.cli.drift.report import report
from trueup.cli.drift.review import accept, grant, ignore, review, undo
from trueup.cli.options import USER, json_option, limit_option, servers
from trueup.cli.output import echo, print_json
from trueup.cli.reports.plain import history_csv
from trueup.cli.reports.terminal import print_history, print_story
from trueup.database.engine import connect
from trueup.errors import UnknownUserError
from trueup.reports.history import history_json, read_history
from trueup.reports.user_report import report_counter
from trueup.settings.settings import get_settings


@click.group()
def drift() -> None:
    """Report and review the drift that reconcile runs found.

    \b
    Example:
      trueup drift report
      trueup drift explain 42
    """


for _command in (report, review, accept, grant, ignore, undo):
    drift.add_command(_command)


@drift.command()
@limit_option(30, 10_000)
@click.option("--days", type=click.IntRange(1, 3_650), help="Only runs of the last days.")
@click.option("--format", "form", type=click.Choice(("table", "json", "csv")), help="The format.  [default: table]")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def history(limit: int, days: int | None, form: str | None) -> None:
    """Show the runs with their figures, and the trend of the drift.

    \b
    Example:
      trueup drift history
      trueup drift history --days 7 --format csv > runs.csv
    """
    with servers("postgres"), connect() as connection:
        runs = read_history(connection, get_settings().host.user_id_type, limit=limit, days=days)
    if form == "json":
        print_json(history_json(runs))
    elif form == "csv":
        echo(history_csv(runs))
    else:
        print_history(runs)


@drift.command()
@click.argument("user", type=USER)
@json_option
def explain(user: UserId, as_json: bool) -> None:
    """Explain USER's counter: its figures, the causes of its drift, and earlier findings and decisions. Writes nothing.

    \b
    Example:
      trueup drift explain 42
    """
    settings = get_settings()
    with servers("postgres"), connect() as connection:
        story = report_counter(connection, settings.host, user, rules=settings.reconcile.rules())
    if not story.account.subscribed and not story.past:
        raise UnknownUserError(f"user: {user} has no subscription. Check the id, and the [host] mapping.")
    if as_json:
        print_json(story.as_json())
    else:
        print_story(story)
