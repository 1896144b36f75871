"""`trueup drift report`: the drift of a run, of all runs since a time, or of the database now."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import click
from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED
from trueup.cli.options import CAUSE, NUMBER, ROWS, SINCE, TOKENS, USER, one_format, require_user, servers
from trueup.cli.output import echo, show, write_file
from trueup.cli.reports.terminal import print_summary
from trueup.database.engine import get_engine, transaction
from trueup.errors import TrueupError
from trueup.preview.report import PreviewReport
from trueup.preview.scan import scan
from trueup.reports.history import RunFigures, read_history
from trueup.reports.rows import DriftFilter, ReportRow
from trueup.reports.run_report import DriftReport, find_source, read_source, stream_rows, with_host_faults
from trueup.settings.settings import get_settings

# A person reads the largest drifts; a program gets all.
DEFAULT_ROWS: dict[str, int | None] = {"table": 50, "json": None, "csv": None, "markdown": 50, "html": 500}
SUFFIXES = {".json": "json", ".csv": "csv", ".md": "markdown", ".html": "html", ".htm": "html"}
RUNS_IN_CHART = 60


@click.command()
@click.option("--run", "run_id", type=NUMBER, help="The number of a run.  [default: the newest]")
@click.option("--since", type=SINCE, help="All runs since a time, or within a time before now: 2026-11-01, 24h, 7d.")
@click.option("--cause", "causes", type=CAUSE, help='Only drifts with this cause, or with all causes joined by "+".')
@click.option("--min", "min_tokens", type=TOKENS, default=0, help="Only drifts of at least this many tokens.")
@click.option("--user", type=USER, help="Only this user.")
@click.option(
    "--rows",
    "--limit",
    "rows",
    type=ROWS,
    help='The number of rows, largest first, or "all", as in json and csv.',
)
@click.option("--format", "form", type=click.Choice(tuple(DEFAULT_ROWS)), help="The format.  [default: table]")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file. Its suffix sets the format."
)
@click.option("--fail-on-drift", is_flag=True, help="Exit with code 3 if there is drift that is not set aside.")
@click.option("--read-only", is_flag=True, help="Compare now, with SELECT rights only. Nothing is set up or written.")
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
    as_json: bool,
    output: Path | None,
    fail_on_drift: bool,
    read_only: bool,
) -> None:
    """Show the drifts that a reconcile run found, corrected, and left for review; or those of all runs since a time.

    \b
    Example:
      trueup drift report
      trueup drift report --since 7d --output drift.html
      trueup drift report --run 7 --cause missed_decrement --min 1000 --format csv > drift.csv
      trueup drift report --read-only
    """
    if run_id is not None and since is not None:
        raise click.UsageError("--run and --since exclude each other: give one run, or a time.")
    if read_only and (run_id is not None or since is not None):
        raise click.UsageError("--read-only compares the current state: leave out --run and --since.")
    form = one_format(form, as_json) or (SUFFIXES.get(output.suffix.lower(), "table") if output else "table")
    if output and form == "table":
        raise click.UsageError("--output: a table is for the terminal. Add --format json, csv, markdown or html.")
    only = DriftFilter(causes=causes or (), min_tokens=min_tokens, user_id=user)
    max_rows = DEFAULT_ROWS[form] if rows is None else None if isinstance(rows, str) else rows
    if read_only:
        found = _report_now(only, form, max_rows, output)
    else:
        found = _report_runs(run_id, since, only, form, max_rows, output)
    if fail_on_drift and found.drifted > found.set_aside:
        ctx.exit(EXIT_DENIED)


def _report_runs(
    run_id: int | None,
    since: datetime | timedelta | None,
    only: DriftFilter,
    form: str,
    max_rows: int | None,
    output: Path | None,
) -> DriftReport:
    settings = get_settings()
    kind = settings.host.user_id_type
    with servers("postgres"), transaction() as connection:
        read_one_snapshot(connection)
        # The reader of a streamed report may page slowly. Its transaction holds no locks that others wait for.
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '15min'"))
        source = find_source(connection, kind, run_id, since=since, only=only)
        if source is None:
            raise TrueupError("There has been no reconcile run yet. Start one with `trueup reconcile`.")
        found = read_source(connection, source, max_rows=0 if _is_streamed(form, max_rows) else max_rows)
        if not found.drifted:
            require_user(connection, only.user_id)
        min_age = settings.reconcile.min_age_seconds
        found = with_host_faults(connection, settings.host, source, found, min_age_seconds=min_age)
        runs = read_history(connection, kind, limit=RUNS_IN_CHART, up_to_run=source.run_id) if form == "html" else []
        if source.since is not None:
            runs = [run for run in runs if run.started_at >= source.since]
        streamed = stream_rows(connection, source) if _is_streamed(form, max_rows) else None
        _show(found, form, output, streamed, runs)
    return found


def _report_now(only: DriftFilter, form: str, max_rows: int | None, output: Path | None) -> DriftReport:
    settings = get_settings()
    with closing(PreviewReport(only)) as preview:
        with servers("postgres"):
            scanned = scan(
                get_engine(),
                settings.host,
                preview.add,
                rules=settings.reconcile.rules(),
                only_user=only.user_id,
                timeout_seconds=settings.statement_timeout_seconds,
                scan_timeout_seconds=settings.reconcile_scan_timeout_seconds,
            )
        found = preview.report(scanned, max_rows=0 if _is_streamed(form, max_rows) else max_rows)
        _show(found, form, output, preview.rows() if _is_streamed(form, max_rows) else None)
    for note in scanned.notes:
        click.echo(show(note), err=True)
    return found


def read_one_snapshot(connection: Connection) -> None:
    """Let all statements of this transaction read the same snapshot, so that the parts of a report agree."""
    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))


def _is_streamed(form: str, max_rows: int | None) -> bool:
    """Return whether rows are written while they are read, because their number has no limit."""
    return form in ("json", "csv") and max_rows is None


def _show(
    found: DriftReport,
    form: str,
    output: Path | None,
    streamed: Iterable[ReportRow] | None,
    runs: Sequence[RunFigures] = (),
) -> None:
    """Print the report, or write it to `output`. `streamed`: rows to write instead of the report's own."""
    if form == "table":
        print_summary(found)
    elif output:
        write_file(output, _chunks(found, form, streamed, runs))
        click.echo(f"Written to {output}.")
    else:
        echo(_chunks(found, form, streamed, runs))


def _chunks(
    found: DriftReport, form: str, streamed: Iterable[ReportRow] | None, runs: Sequence[RunFigures]
) -> Iterable[str]:
    from trueup.cli.reports.html import report_html
    from trueup.cli.reports.markdown import report_markdown
    from trueup.cli.reports.plain import report_csv, report_json

    if form == "html":
        return report_html(found, runs)
    if form == "markdown":
        return report_markdown(found)
    if streamed is not None:
        found = replace(found, rows_left_out=0)
    rows = found.rows if streamed is None else streamed
    return report_json(found, rows) if form == "json" else report_csv(rows)
