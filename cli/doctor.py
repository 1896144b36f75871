"""`trueup doctor`: is everything in place? Each finding with its remedy."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import click

from trueup.cli.context import json_option, servers
from trueup.cli.output import print_json, print_table, without_password
from trueup.doctor.clocks import Offset
from trueup.doctor.database import examine_database
from trueup.doctor.findings import Finding, error, exit_code, run_check
from trueup.doctor.settings import check_settings
from trueup.doctor.versions import check_extras, check_packages, check_python, check_weaker_versions
from trueup.errors import SettingsError, TrueupError
from trueup.settings.settings import Settings, get_settings

SCHEMA_VERSION = 1
"""Of what `--json` prints; docs/doctor.schema.json describes it."""


@click.command()
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, strict: bool, as_json: bool) -> None:
    """Check settings, servers, clocks, the host's tables, triggers, workers and books. Nothing is changed.

    Ends with exit code 1 if anything is wrong, with --strict also if anything is dubious; else 0.

    \b
    Example:
      trueup doctor
      trueup doctor --strict --json
    """
    findings = [_without_passwords(finding) for finding in _examine()]
    if as_json:
        print_json(_document(findings))
    else:
        _print(findings)
    ctx.exit(exit_code(findings, strict=strict))


def _examine() -> Iterator[Finding]:
    yield from run_check("python", check_python)
    yield from run_check("packages", check_packages)
    yield from run_check("packages", check_weaker_versions)
    try:
        settings = get_settings()
    except SettingsError as failure:
        yield error("settings", str(failure), "Correct it: without settings nothing else can be looked at.")
        return
    yield from run_check("settings", lambda: check_settings(settings))
    yield from run_check("extras", lambda: check_extras(settings))
    with ExitStack() as stack:
        try:
            stack.enter_context(servers("postgres", "redis"))
        except TrueupError as failure:
            yield error("stack", str(failure), "Correct its cause; or set TRUEUP_DATABASE_URL and TRUEUP_BROKER_URL.")
        found = run_check("database", lambda: examine_database(settings))
        yield from found
        yield from run_check("redis", lambda: _examine_broker(settings, _offset(found)))


def _examine_broker(settings: Settings, database_offset: Offset | None) -> list[Finding]:
    # Celery takes half a second to load: not for who asks for help.
    from trueup.cli.client import celery_client
    from trueup.worker.doctor import examine_broker

    with celery_client(settings) as app:
        return examine_broker(app, settings, database_offset)


def _offset(found: list[Finding]) -> Offset | None:
    """Return how far the database's clock was found to be ahead of ours; None: it could not be asked."""
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
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning", "ok")}
    return {
        "schema_version": SCHEMA_VERSION,
        "checked_at": datetime.now(UTC),
        "healthy": counts["error"] == 0,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": findings,
    }


def _print(findings: list[Finding]) -> None:
    order = ("error", "warning", "ok")
    rows = [(f.level, f.check, f.what, f.remedy or "") for f in sorted(findings, key=lambda f: order.index(f.level))]
    print_table(("level", "check", "what", "remedy"), rows)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    click.echo(f"{errors} errors, {warnings} warnings.")
