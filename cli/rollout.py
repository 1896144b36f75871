"""`trueup rollout`: how strict the gate is, feature by feature, while it runs."""

from importlib import import_module
from typing import get_args

import click

from trueup.cli.audit import by_option, note_option
from trueup.cli.context import json_option, servers
from trueup.cli.output import print_json, print_table
from trueup.database.engine import connect, transaction
from trueup.gate.modes import EVERY_FEATURE, list_changes, list_modes, list_observed_denials, set_mode
from trueup.settings.gate import GateMode


@click.group()
def rollout() -> None:
    """How strict the gate is, feature by feature: enforce, observe or off.

    enforce: what is denied does not run. observe: it runs, and is noted as it would have been denied. off: it runs.
    Usage is recorded in each. What is set here goes before the settings, at once and for every worker.

    \b
    Example:
      trueup rollout list
      trueup rollout set "Q&A Generator" observe --note "first week"
    """


@rollout.command("list")
@click.option("--hours", type=click.IntRange(1, 24 * 365), default=24, show_default=True, help="How far to look back.")
@json_option
def list_command(hours: int, as_json: bool) -> None:
    """List each feature's mode, and what it would have been denied lately.

    \b
    Example:
      trueup rollout list --hours 168
    """
    with servers("postgres"), connect() as connection:
        modes = list_modes(connection, known=_task_features(), hours=hours)
        denials = list_observed_denials(connection, hours=hours)
    if as_json:
        print_json({"features": modes, "observed_denials": denials})
        return
    print_table(
        ("feature", "mode", "set by", "let pass", "tokens", "users"),
        [(_title(m.feature_name), m.mode, m.source, m.denied, m.denied_tokens, m.denied_users) for m in modes],
    )
    if denials:
        click.echo(f"\nWould have been denied in the last {hours} h:")
        rows = [(d.feature_name, d.reason, d.times, d.tokens, d.users, d.last_at) for d in denials]
        print_table(("feature", "reason", "times", "tokens", "users", "last (UTC)"), rows)


@rollout.command("set")
@click.argument("feature")
@click.argument("mode", type=click.Choice(get_args(GateMode)))
@note_option
@by_option
def set_command(feature: str, mode: GateMode, note: str, by: str) -> None:
    """Set a FEATURE's mode from now on. "*" is every feature that has none of its own.

    The name is the feature's, as in `trueup rollout list` and in the decorators.

    \b
    Example:
      trueup rollout set "Q&A Generator" enforce --note "a week without surprises"
      trueup rollout set "*" observe --note "rollout begins"
    """
    _change(feature, mode, note=note, by=by)


@rollout.command()
@click.argument("feature")
@note_option
@by_option
def reset(feature: str, note: str, by: str) -> None:
    """Let the settings decide a FEATURE's mode again.

    \b
    Example:
      trueup rollout reset "*" --note "all is enforced by the settings now"
    """
    _change(feature, None, note=note, by=by)


@rollout.command()
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def history(limit: int, as_json: bool) -> None:
    """List who changed which mode, when and why, newest first.

    \b
    Example:
      trueup rollout history
    """
    with servers("postgres"), connect() as connection:
        changes = list_changes(connection, limit=limit)
    if as_json:
        print_json(changes)
        return
    rows = [
        (c.changed_at, _title(c.feature_name), c.mode_before or "settings", c.mode or "settings", c.changed_by, c.note)
        for c in changes
    ]
    print_table(("when (UTC)", "feature", "before", "since", "by", "note"), rows, empty="Nothing was changed yet.")


def _change(feature: str, mode: GateMode | None, *, note: str, by: str) -> None:
    with servers("postgres"), transaction() as connection:
        before = set_mode(connection, feature, mode, changed_by=by, note=note)
        known = {m.feature_name for m in list_modes(connection, known=_task_features())}
    said = mode or "as the settings say"
    unchanged = " (as before)" if before == mode else ""
    click.echo(f"{_title(feature)}: {said}{unchanged}")
    if mode and feature not in known - {feature} | {EVERY_FEATURE, *_task_features()}:
        click.echo(
            f"Note: no task here has a feature {feature!r}. A decorated view may; else check its name.", err=True
        )


def _task_features() -> list[str]:
    """Return the features of trueup's tasks, and of the project's under `celery -A proj trueup`."""
    from celery import current_app

    from trueup.tasks import TASK_MODULES

    for module in TASK_MODULES:
        import_module(module)
    return sorted({task.feature_name for task in current_app.tasks.values() if hasattr(task, "feature_name")})


def _title(feature: str) -> str:
    return "* (every other)" if feature == EVERY_FEATURE else feature
