"""`trueup drift`: reports of what reconciling found."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import click
from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED
from trueup.cli.context import TOKENS, USER, json_option, servers
from trueup.cli.drift.preview import show_preview
from trueup.cli.drift.report import FORMATS, echo, print_summary
from trueup.cli.drift.review import accept, grant, ignore, review, undo
from trueup.cli.output import print_json
from trueup.cli.reports.options import CAUSE, ROWS, SINCE, write_file
from trueup.database.engine import connect, transaction
from trueup.errors import TrueupError, UnknownUserError
from trueup.reports.history import history_json, read_history
from trueup.reports.rows import DriftFilter
from trueup.reports.run_report import DriftReport, ReportSource, find_source, read_source, stream_rows
from trueup.settings.settings import get_settings

# The largest drifts are what a person looks at; a program gets all.
DEFAULT_ROWS: dict[str, int | None] = {"table": 50, "markdown": 50, "html": 500, "json": None, "csv": None}
SUFFIXES = {".json": "json", ".csv": "csv", ".md": "markdown", ".html": "html", ".htm": "html"}
RUNS_IN_CHART = 60


@click.group()
def drift() -> None:
    """Reports of what reconciling found.

    \b
    Example:
      trueup drift report
      trueup drift explain 42
    """


for _command in (review, accept, grant, ignore, undo):
    drift.add_command(_command)


@drift.command()
@click.option("--run", "run_id", type=click.IntRange(1, 2**63 - 1), help="A run's number; by default the newest.")
@click.option("--since", type=SINCE, help="All runs since a time, or for so long back: 2026-11-01, 24h, 7d.")
@click.option(
    "--cause", "causes", type=CAUSE, help='Only drifts of this cause; several joined by "+" must all be there.'
)
@click.option("--min", "min_tokens", type=TOKENS, default=0, help="Only drifts of at least so many tokens.")
@click.option("--user", type=USER, help="Only this user's.")
@click.option("--rows", type=ROWS, help='How many rows, the largest first, or "all"; json and csv have all by default.')
@click.option("--format", "form", type=click.Choice(FORMATS), help="How to show it.  [default: table]")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to a file; its ending names the format."
)
@click.option("--fail-on-drift", is_flag=True, help="Exit with code 3 if it tells of drift that is not set aside.")
@click.option(
    "--read-only", is_flag=True, help="Compare now, with SELECT rights alone: nothing is set up, nothing is written."
)
@click.pass_context
def report(
    ctx: click.Context,
    run_id: int | None,
    since: datetime | timedelta | None,
    causes: tuple[str, ...] | None,
    min_tokens: int,
    user: UserId | None,
    rows: int | str | None,
    form: str | None,
    output: Path | None,
    fail_on_drift: bool,
    read_only: bool,
) -> None:
    """Show what a reconcile run found, corrected, and left to a person; or all runs since a time.

    \b
    Example:
      trueup drift report
      trueup drift report --since 7d --output drift.html
      trueup drift report --run 7 --cause missed_decrement --min 1000 --format csv > drift.csv
      trueup drift report --read-only
    """
    if run_id is not None and since is not None:
        raise click.UsageError("--run and --since exclude each other: give one run, or a time.")
    form = form or (SUFFIXES.get(output.suffix.lower(), "table") if output else "table")
    if output and form == "table":
        raise click.UsageError("--output: a table is for the terminal. Add --format json, csv, markdown or html.")
    only = DriftFilter(causes=causes or (), min_tokens=min_tokens, user_id=user)
    most = DEFAULT_ROWS[form] if rows is None else None if isinstance(rows, str) else rows
    if read_only:
        if run_id is not None or since is not None:
            raise click.UsageError("--read-only looks at what is now: leave out --run and --since.")
        looked = show_preview(only, form, most, output)
        if fail_on_drift and looked.drifted > looked.set_aside:
            ctx.exit(EXIT_DENIED)
        return
    with servers("postgres"), transaction() as connection:
        # One snapshot for all of a report, whatever is written meanwhile.
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        # Whoever reads what is streamed may page through it slowly; nobody waits for this transaction.
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '15min'"))
        source = find_source(connection, get_settings().host.user_id_type, run_id, since=since, only=only)
        if source is None:
            raise TrueupError("There has been no reconcile run yet. Start one with `trueup reconcile`.")
        found = _show(connection, source, form, most, output)
    if fail_on_drift and found.drifted > found.set_aside:
        ctx.exit(EXIT_DENIED)


def _show(
    connection: Connection, source: ReportSource, form: str, most: int | None, output: Path | None
) -> DriftReport:
    # Without a bound the rows are written as they are read.
    streamed = form in ("json", "csv") and most is None
    found = read_source(connection, source, max_rows=0 if streamed else most)
    if form == "table":
        print_summary(found)
        return found
    chunks = _chunks(connection, source, found, form, streamed=streamed)
    if output:
        write_file(output, chunks)
        click.echo(f"Written to {output}.")
    else:
        echo(chunks)
    return found


def _chunks(
    connection: Connection, source: ReportSource, found: DriftReport, form: str, *, streamed: bool
) -> Iterable[str]:
    from trueup.cli.reports.html import report_html
    from trueup.cli.reports.markdown import report_markdown
    from trueup.cli.reports.plain import report_csv, report_json

    if form == "html":
        user_id_type = get_settings().host.user_id_type
        runs = read_history(connection, user_id_type, limit=RUNS_IN_CHART, up_to_run=source.run_id)
        return report_html(found, [run for run in runs if source.since is None or run.started_at >= source.since])
    if form == "markdown":
        return report_markdown(found)
    rows = stream_rows(connection, source) if streamed else found.rows
    whole = replace(found, rows_left_out=0) if streamed else found
    return report_json(whole, rows) if form == "json" else report_csv(rows)


@drift.command()
@click.option("--limit", type=click.IntRange(1, 10_000), default=30, show_default=True, help="How many runs at most.")
@click.option("--days", type=click.IntRange(1, 3_650), help="Only runs of the last so many days.")
@click.option("--format", "form", type=click.Choice(("table", "json", "csv")), help="How to show it.  [default: table]")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def history(limit: int, days: int | None, form: str | None) -> None:
    """Show the runs with their figures, and how drift develops.

    \b
    Example:
      trueup drift history
      trueup drift history --days 7 --format csv > runs.csv
    """
    from trueup.cli.reports.history import print_history
    from trueup.cli.reports.plain import history_csv

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
    """Show all about USER's counter: its figures, why it is off, and what was done about it before. Writes nothing.

    \b
    Example:
      trueup drift explain 42
    """
    from trueup.cli.reports.story import print_story
    from trueup.reports.user_report import report_counter

    settings = get_settings()
    with servers("postgres"), connect() as connection:
        story = report_counter(connection, settings.host, user, rules=settings.reconcile.rules())
    if not story.account.subscribed and not story.past:
        raise UnknownUserError(f"user: {user} has no subscription. Check the id, and the [host] mapping.")
    if as_json:
        print_json(story.as_json())
    else:
        print_story(story)
