"""`trueup reconcile`: compare every counter with the usage log, and correct it."""

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from billing import db
from billing import reconcile as reconciliation
from billing.drift_reports import DriftReport, read_report, report_dry_run
from billing.settings import get_settings
from billing.users import UserId
from cli import EXIT_DENIED
from cli.context import USER, json_option, servers
from cli.output import console
from cli.report import print_report

ROWS_SHOWN = 20


@click.command()
@click.option("--dry-run", is_flag=True, help="Only look: write nothing at all.")
@click.option("--user", type=USER, help="Only this user's counter.")
@click.option("--fail-on-drift", is_flag=True, help="Exit with code 3 if a counter had drifted.")
@json_option
@click.pass_context
def reconcile(ctx: click.Context, dry_run: bool, user: UserId | None, fail_on_drift: bool, as_json: bool) -> None:
    """Compare every counter with the usage log, correct what may be corrected, and say why.

    \b
    Example:
      trueup reconcile --dry-run
      trueup reconcile --user 42
    """
    with servers("postgres"):
        report = _run(dry_run, user)
    print_report(report, "json" if as_json else "table", most_rows=ROWS_SHOWN)
    if fail_on_drift and report.drifted:
        ctx.exit(EXIT_DENIED)


def _run(dry_run: bool, user: UserId | None) -> DriftReport:
    settings = get_settings()
    columns = (TextColumn("reconciling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    out = console(stderr=True)
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        job = bar.add_task("counters", total=None)

        def progress(checked: int, total: int) -> None:
            bar.update(job, completed=checked, total=max(total, checked))

        with db.translated_errors():
            summary = reconciliation.reconcile(
                db.get_engine(),
                settings.host,
                dry_run=dry_run,
                only_user=user,
                batch_size=settings.reconcile_batch_size,
                keep_findings=dry_run,
                progress=progress,
            )
    if summary.run_id is None:
        return report_dry_run(summary)
    with db.connect() as connection:
        report = read_report(connection, settings.host.user_id_type, summary.run_id)
    assert report is not None  # noqa: S101 - read_report raises for a run that is not there
    return report
