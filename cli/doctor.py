"""`trueup doctor`: check settings, servers, tables and workers, with a remedy for each problem."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import click

from trueup.cli.options import json_option, servers
from trueup.cli.output import count_of, print_json, print_table, without_password
from trueup.doctor.clocks import Offset
from trueup.doctor.database import examine_database
from trueup.doctor.findings import Finding, error, exit_code, run_check
from trueup.doctor.settings import check_settings
from trueup.doctor.versions import check_extras, check_packages, check_python, check_weaker_versions
from trueup.errors import SettingsError, TrueupError
from trueup.settings.settings import Settings, get_settings


@click.command()
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, strict: bool, as_json: bool) -> None:
    """Check settings, servers, clocks, the host's tables, triggers, workers and balances. Nothing is changed.

    Exit code 1: there is an error or, with --strict, a warning. Otherwise 0.

    \b
    Example:
      trueup doctor
      trueup doctor --strict --json
    """
    findings = [_without_passwords(finding) for finding in _examine()]
    if as_json:
        print_json(_document(findings))
    else:
        order = ("error", "warning", "ok")
        rows = [(f.level, f.check, f.what, f.remedy or "") for f in findings]
        print_table(("level", "check", "what", "remedy"), sorted(rows, key=lambda row: order.index(row[0])))
        counts = Counter(finding.level for finding in findings)
        click.echo(f"{count_of(counts['error'], 'error')}, {count_of(counts['warning'], 'warning')}.")
    ctx.exit(exit_code(findings, strict=strict))


def _examine() -> Iterator[Finding]:
    yield from run_check("python", check_python)
    yield from run_check("packages", check_packages)
    yield from run_check("packages", check_weaker_versions)
    try:
        settings = get_settings()
    except SettingsError as failure:
        yield error("settings", str(failure), "Correct the setting. The other checks need valid settings.")
        return
    yield from run_check("settings", lambda: check_settings(settings))
    yield from run_check("extras", lambda: check_extras(settings))
    with ExitStack() as stack:
        try:
            stack.enter_context(servers("postgres", "redis"))
        except TrueupError as failure:
            yield error("stack", str(failure), "Correct the cause, or set TRUEUP_DATABASE_URL and TRUEUP_BROKER_URL.")
        found = run_check("database", lambda: examine_database(settings))
        yield from found
        yield from run_check("redis", lambda: _examine_broker(settings, _offset(found)))


def _examine_broker(settings: Settings, database_offset: Offset | None) -> list[Finding]:
    # Celery takes half a second to load, which `--help` must not.
    from trueup.cli.client import celery_client
    from trueup.worker.doctor import examine_broker

    with celery_client(settings) as app:
        return examine_broker(app, settings, database_offset)


def _offset(found: list[Finding]) -> Offset | None:
    """Return the offset of the database's clock from this machine's; None: unknown."""
    for finding in found:
        if finding.check == "database_clock" and "offset_seconds" in finding.detail:
            seconds, uncertainty = finding.detail["offset_seconds"], finding.detail["uncertainty_seconds"]
            return Offset(seconds=seconds, uncertainty=uncertainty)
    return None


def _without_passwords(finding: Finding) -> Finding:
    return replace(
        finding, what=without_password(finding.what), remedy=finding.remedy and without_password(finding.remedy)
    )


def _document(findings: list[Finding]) -> dict[str, Any]:
    """Return what docs/doctor.schema.json describes."""
    counts = Counter(finding.level for finding in findings)
    return {
        "checked_at": datetime.now(UTC),
        "healthy": counts["error"] == 0,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": findings,
    }
