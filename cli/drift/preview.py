"""`trueup drift report --read-only`: the drift of a database in which nothing is set up, and nothing is written."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click

from trueup.cli.context import servers
from trueup.cli.drift.report import echo, print_summary
from trueup.cli.output import show
from trueup.cli.reports.options import write_file
from trueup.database.engine import get_engine
from trueup.preview.report import PreviewReport
from trueup.preview.scan import scan
from trueup.reports.rows import DriftFilter
from trueup.reports.run_report import DriftReport
from trueup.settings.settings import get_settings


def show_preview(only: DriftFilter, form: str, most: int | None, output: Path | None) -> DriftReport:
    """Look at the counters that `only` chooses, and show what drifts in that form. `most` None: every row."""
    settings = get_settings()
    with closing(PreviewReport(only)) as found:
        with servers("postgres"):
            told = scan(
                get_engine(),
                settings.host,
                found.add,
                rules=settings.reconcile.rules(),
                only_user=only.user_id,
                timeout_seconds=settings.statement_timeout_seconds,
                scan_timeout_seconds=settings.reconcile_scan_timeout_seconds,
            )
        # Without a bound the rows are written as they are read.
        streamed = form in ("json", "csv") and most is None
        report = found.report(told, max_rows=0 if streamed else most)
        if form == "table":
            print_summary(report)
        elif output:
            write_file(output, _chunks(report, found, form, streamed=streamed))
            click.echo(f"Written to {output}.")
        else:
            echo(_chunks(report, found, form, streamed=streamed))
    for note in told.notes:
        click.echo(show(note), err=True)
    return report


def _chunks(report: DriftReport, found: PreviewReport, form: str, *, streamed: bool) -> Iterable[str]:
    from trueup.cli.reports.html import report_html
    from trueup.cli.reports.markdown import report_markdown
    from trueup.cli.reports.plain import report_csv, report_json

    if form == "html":
        return report_html(report, [])
    if form == "markdown":
        return report_markdown(report)
    rows = found.rows() if streamed else report.rows
    whole = replace(report, rows_left_out=0) if streamed else report
    return report_json(whole, rows) if form == "json" else report_csv(rows)
