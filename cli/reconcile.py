"""`trueup reconcile`: compare every counter with the usage log and correct it."""

import gc
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import click

from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED, EXIT_ERROR
from trueup.cli.drift.report import read_one_snapshot
from trueup.cli.options import TOKENS, USER, json_option, require_user, servers, this_user
from trueup.cli.output import echo, print_table
from trueup.cli.progress import progress_bar
from trueup.cli.reports.plain import report_json
from trueup.cli.reports.terminal import print_summary
from trueup.database.engine import create_trueup_engine, transaction
from trueup.database.retry import retrying
from trueup.reconcile import local_run as reconciliation
from trueup.reconcile.audit import Defect, read_defects
from trueup.reconcile.runs import RunSummary
from trueup.reports.run_report import (
    DriftReport,
    find_source,
    read_source,
    report_dry_run,
    stream_rows,
    with_host_faults,
)
from trueup.settings.policies import Rules
from trueup.settings.settings import Settings, database_url, get_settings

ROWS_SHOWN = 20
MAX_JOBS = 64


@click.command()
@click.option("--dry-run", is_flag=True, help="Compare and report. Write nothing.")
@click.option("--deep", is_flag=True, help="Compare the balances with the usage log first, and repair them.")
@click.option("--user", type=USER, help="Only the counter of this user.")
@click.option("--jobs", type=click.IntRange(1, MAX_JOBS), default=1, show_default=True, help="Shards in parallel.")
@click.option("--max-correction", type=TOKENS, help="Hold a drift of more tokens for review.")
@click.option("--tolerance", type=TOKENS, help="Ignore a drift of at most this many tokens.")
@click.option("--batch-size", type=click.IntRange(1, 10_000), help="The counters that one transaction corrects.")
@click.option("--fail-on-drift", is_flag=True, help="Exit with code 3 for a defect, or a drift that is not set aside.")
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
    """Compare every counter with the usage log, correct the drifts that a machine may correct, and report the causes.

    Ctrl-C or SIGTERM ends the run after the current batch. The next call resumes it.

    \b
    Example:
      trueup reconcile --dry-run
      trueup reconcile --deep --jobs 4
      trueup reconcile --user 42 --max-correction 10000
    """
    if deep and user is not None:
        raise click.UsageError("--deep compares the balances of all users: leave out --user or --deep.")
    settings = get_settings()
    limits = {"max_correction": max_correction, "tolerance": tolerance}
    given = {name: tokens for name, tokens in limits.items() if tokens is not None}
    rules = settings.reconcile.model_copy(update=given).rules()
    with _sigterm_as_ctrl_c(), servers("postgres"):
        if user is not None:
            retrying(lambda connection: require_user(connection, user))
        summary = _run(settings, rules, dry_run=dry_run, deep=deep, user=user, jobs=jobs, batch_size=batch_size)
        report, defects = _show(settings, summary, as_json=as_json)
    if report.status != "finished":
        ctx.exit(EXIT_ERROR)
    if fail_on_drift and (report.drifted > report.set_aside or defects):
        ctx.exit(EXIT_DENIED)


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
    # One connection for each job and one for heartbeats.
    pool = max(settings.database_pool_size, jobs + 1)
    settings = settings.model_copy(update={"database_url": database_url(settings), "database_pool_size": pool})
    engine = create_trueup_engine(settings)
    # Imported objects stay until the end. Garbage collections of them would take a quarter of the time.
    gc.freeze()
    try:
        with progress_bar("reconciling", "rows") as show_progress:
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
                progress=lambda checked, total: show_progress(checked, max(total, checked)),
            )
    except KeyboardInterrupt:
        kept = "Nothing was written." if dry_run else "Corrections stay; the next `trueup reconcile` resumes the run."
        click.echo(f"Interrupted. {kept}", err=True)
        raise
    finally:
        engine.dispose()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C: the current batch ends, and the next run can resume."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _show(settings: Settings, summary: RunSummary, *, as_json: bool) -> tuple[DriftReport, int]:
    """Print the report and the defects. Returns the report and the number of defects."""
    if summary.run_id is None:
        report = report_dry_run(summary)
        if as_json:
            echo(report_json(report, report.rows))
        else:
            print_summary(report, ROWS_SHOWN)
            _print_defects(summary.defect_rows, summary.defects)
        return report, summary.defects
    kind = settings.host.user_id_type
    with transaction() as connection:
        read_one_snapshot(connection)
        source = find_source(connection, kind, summary.run_id)
        assert source is not None  # noqa: S101 - find_source raises for an unknown run
        report = read_source(connection, source, max_rows=0 if as_json else ROWS_SHOWN)
        min_age = settings.reconcile.min_age_seconds
        report = with_host_faults(connection, settings.host, source, report, min_age_seconds=min_age)
        if as_json:
            echo(report_json(replace(report, rows_left_out=0), stream_rows(connection, source)))
        else:
            if summary.resumed:
                click.echo(f"Resumed run {summary.run_id}, which had been interrupted.\n")
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
                *(defect.kind.replace("_", " "), None if defect.user_id is None else str(defect.user_id)),
                *(defect.seen, defect.expected, defect.repaired),
                ", ".join(f"{name} {value}" for name, value in defect.detail.items()),
            )
            for defect in defects[:ROWS_SHOWN]
        ],
    )
    if total > ROWS_SHOWN:
        click.echo(f"and {total - ROWS_SHOWN:,} more defects")
