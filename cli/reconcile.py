"""`trueup reconcile`: compare every counter with the usage log, and correct it."""

import gc
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import click
from sqlalchemy import text

from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED, EXIT_ERROR
from trueup.cli.audit import this_user
from trueup.cli.context import TOKENS, USER, json_option, servers
from trueup.cli.drift.report import echo, print_report, print_summary
from trueup.cli.output import print_table
from trueup.cli.progress import progress_bar
from trueup.cli.reports.plain import report_json
from trueup.database.engine import create_trueup_engine, transaction
from trueup.reconcile import local_run as reconciliation
from trueup.reconcile.audit import Defect, read_defects
from trueup.reconcile.runs import RunSummary
from trueup.reports.run_report import DriftReport, find_source, read_source, report_dry_run, stream_rows
from trueup.settings.policies import Rules
from trueup.settings.settings import Settings, database_url, get_settings

ROWS_SHOWN = 20
MAX_JOBS = 64


@click.command()
@click.option("--dry-run", is_flag=True, help="Only look: write nothing at all.")
@click.option("--deep", is_flag=True, help="Compare the balances with the usage log first, and repair them.")
@click.option("--user", type=USER, help="Only this user's counter.")
@click.option(
    "--jobs",
    type=click.IntRange(1, MAX_JOBS),
    default=1,
    show_default=True,
    help="Work on so many shards at once, each in a thread.",
)
@click.option("--max-correction", type=TOKENS, help="Hold a counter that is off by more tokens for review.")
@click.option("--tolerance", type=TOKENS, help="Leave a counter that is off by at most so many tokens alone.")
@click.option("--batch-size", type=click.IntRange(1, 10_000), help="Counters that are corrected at once.")
@click.option(
    "--fail-on-drift", is_flag=True, help="Exit with code 3 if there is drift that is not set aside, or a defect."
)
@json_option
@click.pass_context
def reconcile(
    ctx: click.Context,
    dry_run: bool,
    deep: bool,
    user: UserId | None,
    jobs: int,
    max_correction: int | None,
    tolerance: int | None,
    batch_size: int | None,
    fail_on_drift: bool,
    as_json: bool,
) -> None:
    """Compare every counter with the usage log, correct what may be corrected, and say why.

    Ctrl-C or SIGTERM ends it after the batch it is in; the next call goes on from there.

    \b
    Example:
      trueup reconcile --dry-run
      trueup reconcile --deep --jobs 4
      trueup reconcile --user 42 --max-correction 10000
    """
    if deep and user is not None:
        raise click.UsageError("--deep looks at everyone: leave out --user, or do a quick pass.")
    settings = get_settings()
    rules = _rules(settings, max_correction, tolerance)
    with _sigterm_as_ctrl_c(), servers("postgres"):
        summary = _run(settings, rules, dry_run=dry_run, deep=deep, user=user, jobs=jobs, batch_size=batch_size)
        report, defects = _show(settings, summary, as_json=as_json)
    if report.status != "finished":
        ctx.exit(EXIT_ERROR)
    if fail_on_drift and (report.drifted > report.set_aside or defects):
        ctx.exit(EXIT_DENIED)


def _rules(settings: Settings, max_correction: int | None, tolerance: int | None) -> Rules:
    """Return the settings' rules with what the options change."""
    rules = settings.reconcile.rules()
    if max_correction is not None:
        rules = replace(rules, max_correction=max_correction)
    if tolerance is not None:
        rules = replace(rules, tolerance=tolerance)
    return rules


def _run(
    settings: Settings,
    rules: Rules,
    *,
    dry_run: bool,
    deep: bool,
    user: UserId | None,
    jobs: int,
    batch_size: int | None,
) -> RunSummary:
    # One connection a job, and one for signs of life.
    pool = max(settings.database_pool_size, jobs + 1)
    settings = settings.model_copy(update={"database_url": database_url(settings), "database_pool_size": pool})
    engine = create_trueup_engine(settings)
    # What was imported stays until the end: to look through it again and again costs a quarter of the work.
    gc.freeze()
    try:
        with progress_bar("reconciling", "rows") as bar:
            return reconciliation.reconcile(
                engine,
                settings.host,
                kind="deep" if deep else "quick",
                dry_run=dry_run,
                only_user=user,
                rules=rules,
                batch_size=batch_size or settings.reconcile_batch_size,
                jobs=jobs,
                scan_timeout_seconds=settings.reconcile_scan_timeout_seconds,
                requested_by=f"{this_user()}@{socket.gethostname()}",
                keep_findings=dry_run,
                progress=lambda checked, total: bar.update(checked, max(total, checked)),
            )
    except KeyboardInterrupt:
        left = "Nothing was written." if dry_run else "What was corrected stays; the next `trueup reconcile` goes on."
        click.echo(f"Interrupted. {left}", err=True)
        raise
    finally:
        engine.dispose()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: what it is in the middle of is finished, and may be gone on with."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other may set handlers
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _show(settings: Settings, summary: RunSummary, *, as_json: bool) -> tuple[DriftReport, int]:
    """Print what was found. Returns the report, and how many defects there are."""
    if summary.run_id is None:
        report = report_dry_run(summary)
        print_report(report, "json" if as_json else "table", most_rows=ROWS_SHOWN)
        if not as_json:
            _print_defects(summary.defect_rows, summary.defects)
        return report, summary.defects
    kind = settings.host.user_id_type
    with transaction() as connection:
        # One snapshot for all of a report, whatever is written meanwhile; and rows that are shown as they are read.
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        source = find_source(connection, kind, summary.run_id)
        assert source is not None  # noqa: S101 - find_source raises for a run that is not there
        report = read_source(connection, source, max_rows=0 if as_json else ROWS_SHOWN)
        if as_json:
            echo(report_json(replace(report, rows_left_out=0), stream_rows(connection, source)))
        else:
            if summary.resumed:
                click.echo(f"Went on with run {summary.run_id}, which had been interrupted.\n")
            print_summary(report, ROWS_SHOWN)
            _print_defects(read_defects(connection, kind, summary.run_id, limit=ROWS_SHOWN), summary.defects)
    return report, summary.defects


def _print_defects(defects: list[Defect], total: int) -> None:
    if not total:
        return
    click.echo()
    print_table(
        ("defect", "user", "seen", "expected", "repaired", "detail"),
        [
            (
                defect.kind.replace("_", " "),
                None if defect.user_id is None else str(defect.user_id),
                defect.seen,
                defect.expected,
                defect.repaired,
                ", ".join(f"{name} {value}" for name, value in defect.detail.items()),
            )
            for defect in defects[:ROWS_SHOWN]
        ],
    )
    if total > ROWS_SHOWN:
        click.echo(f"and {total - ROWS_SHOWN:,} more defects")
