"""`trueup drift`: drift reports, the history of runs, the explanation of a counter, and the review queue."""

from datetime import datetime, timedelta

import click

from trueup.accounts.user_ids import UserId
from trueup.cli import SuggestingGroup
from trueup.cli.drift.report import report
from trueup.cli.drift.review import accept, grant, ignore, review, undo
from trueup.cli.options import SINCE, USER, json_option, limit_option, one_format, servers, time_of
from trueup.cli.output import echo, print_json
from trueup.cli.reports.plain import history_csv
from trueup.cli.reports.terminal import print_history, print_story
from trueup.database.engine import connect
from trueup.errors import UnknownUserError
from trueup.reports.history import history_json, read_history
from trueup.reports.user_report import report_counter
from trueup.settings.settings import get_settings


@click.group(cls=SuggestingGroup)
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
@click.option("--since", type=SINCE, help="Only runs since a time: 24h, 7d, 2026-11-01.")
@click.option("--format", "form", type=click.Choice(("table", "json", "csv")), help="The format.  [default: table]")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def history(limit: int, since: datetime | timedelta | None, form: str | None, as_json: bool) -> None:
    """Show the runs with their figures, and the trend of the drift.

    \b
    Example:
      trueup drift history
      trueup drift history --since 7d --format csv > runs.csv
    """
    form = one_format(form, as_json)
    with servers("postgres"), connect() as connection:
        runs = read_history(connection, get_settings().host.user_id_type, limit=limit, since=time_of(since))
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
