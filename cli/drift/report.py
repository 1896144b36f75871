"""How a drift report is shown in a terminal, and in the formats of other programs."""

from collections.abc import Iterable

import click

from trueup.cli.output import print_facts, print_table
from trueup.cli.reports.figures import summary_of
from trueup.cli.reports.plain import report_csv, report_json
from trueup.drift.causes import cause_title
from trueup.reports.run_report import DriftReport

FORMATS = ("table", "json", "csv", "markdown", "html")


def print_report(report: DriftReport, form: str, *, most_rows: int | None = None) -> None:
    """Print a report as "table", "json" or "csv". `most_rows`: a table shows no more; None means all."""
    if form == "json":
        echo(report_json(report, report.rows))
    elif form == "csv":
        echo(report_csv(report.rows))
    else:
        print_summary(report, most_rows)


def echo(chunks: Iterable[str]) -> None:
    # By click, which knows what to do when the reader has gone.
    for chunk in chunks:
        click.echo(chunk, nl=False)


def print_summary(report: DriftReport, most_rows: int | None = None) -> None:
    """Print the figures, the causes, and the largest drifts. `most_rows` None: all that the report has."""
    print_facts(summary_of(report))
    shown = report.rows if most_rows is None else report.rows[:most_rows]
    if report.causes:
        click.echo()
        print_table(
            ("cause", "drifts", "certain", "tokens overstated", "tokens understated"),
            [
                (cause_title(c.cause), c.drifts, c.certain, c.tokens_overstated, c.tokens_understated)
                for c in report.causes
            ],
        )
    if shown:
        click.echo()
        print_table(
            ("user", "observed", "expected", "drift", "cause", "certainty", "action", "written"),
            [
                (
                    str(row.user_id),
                    row.observed,
                    row.expected,
                    row.drift,
                    cause_title(row.cause),
                    row.certainty,
                    row.action.replace("_", " "),
                    row.written,
                )
                for row in shown
            ],
        )
    left = report.drifted - len(shown)
    if left and shown:
        click.echo(f"and {left:,} smaller ones: `trueup {_everything(report)}`")


def _everything(report: DriftReport) -> str:
    if report.kind == "look":
        return "drift report --read-only --rows all"
    if report.dry_run:
        return "reconcile --dry-run --json"
    return "drift report --rows all" if report.run_id is None else f"drift report --run {report.run_id} --rows all"
