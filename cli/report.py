"""How a drift report is shown."""

import csv
import io
import json

import click

from billing.drift_reports import DriftReport
from cli.output import print_facts, print_json, print_table

FORMATS = ("table", "json", "csv")
COLUMNS = ("user_id", "subscription_id", "observed", "expected", "drift", "cause", "action", "written", "evidence")


def print_report(report: DriftReport, form: str, *, most_rows: int | None = None) -> None:
    """Print a report as one of `FORMATS`. `most_rows`: a table shows no more; None means all."""
    if form == "json":
        print_json(report.as_json())
    elif form == "csv":
        _print_csv(report)
    else:
        _print_table(report, most_rows)


def _print_csv(report: DriftReport) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(COLUMNS)
    for row in report.rows:
        fields = [getattr(row, name) for name in COLUMNS[:-1]]
        writer.writerow([*fields, json.dumps(row.evidence)])
    # By click, which knows what to do when the reader has gone.
    click.echo(lines.getvalue(), nl=False)


def _print_table(report: DriftReport, most_rows: int | None) -> None:
    run = "dry run, nothing was written" if report.run_id is None else str(report.run_id)
    print_facts(
        {
            "run": run,
            "status": report.status,
            "started (UTC)": report.started_at,
            "finished (UTC)": report.finished_at,
            "counters checked": report.checked,
            "drifted": report.drifted,
            "corrected": report.corrected,
            "tokens overstated": report.tokens_overstated,
            "tokens understated": report.tokens_understated,
        }
    )
    shown = report.rows if most_rows is None else report.rows[:most_rows]
    if not shown:
        return
    click.echo()
    print_table(
        ("user", "observed", "expected", "drift", "cause", "action", "written"),
        [
            (
                str(row.user_id),
                row.observed,
                row.expected,
                row.drift,
                row.cause.replace("_", " "),
                row.action.replace("_", " "),
                row.written,
            )
            for row in shown
        ],
    )
    if len(shown) < len(report.rows):
        everything = "reconcile --dry-run --json" if report.run_id is None else f"drift report --run {report.run_id}"
        click.echo(f"and {len(report.rows) - len(shown):,} more: `trueup {everything}`")
