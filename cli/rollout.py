"""`trueup rollout`: the mode of the gate for each feature, changed without a restart."""

from datetime import datetime, timedelta
from importlib import import_module
from typing import get_args

import click

from trueup.cli import SuggestingGroup
from trueup.cli.options import by_option, hours_since, json_option, limit_option, note_option, servers, since_option
from trueup.cli.output import print_json, print_table
from trueup.database.engine import connect, transaction
from trueup.gate.modes import EVERY_FEATURE, list_changes, list_modes, list_observed_denials, set_mode
from trueup.settings.gate import GateMode


@click.group(cls=SuggestingGroup)
def rollout() -> None:
    """Show and set the gate's mode for each feature: enforce, observe or off.

    enforce: a denied task does not run. observe: it runs, and the denial is recorded. off: it runs. Usage is recorded
    in every mode. A mode that is set here overrides the settings, at once and for every worker.

    \b
    Example:
      trueup rollout list
      trueup rollout set "Q&A Generator" observe --note "first week"
    """


@rollout.command("list")
@since_option
@json_option
def list_command(since: datetime | timedelta, as_json: bool) -> None:
    """List each feature's mode, and the denials that observe recorded lately.

    \b
    Example:
      trueup rollout list --since 7d
    """
    hours = hours_since(since)
    with servers("postgres"), connect() as connection:
        modes = list_modes(connection, known=_task_features(), hours=hours)
        denials = list_observed_denials(connection, hours=hours)
    if as_json:
        print_json({"features": modes, "observed_denials": denials})
        return
    print_table(
        ("feature", "mode", "set by", "observed denials", "tokens", "users"),
        [(_title(m.feature_name), m.mode, m.source, m.denied, m.denied_tokens, m.denied_users) for m in modes],
    )
    if denials:
        click.echo(f"\nObserved denials in the last {hours} h:")
        rows = [(d.feature_name, d.reason, d.times, d.tokens, d.users, d.last_at) for d in denials]
        print_table(("feature", "reason", "times", "tokens", "users", "last (UTC)"), rows)


@rollout.command("set")
@click.argument("feature")
@click.argument("mode", type=click.Choice(get_args(GateMode)))
@note_option
@by_option
def set_command(feature: str, mode: GateMode, note: str, by: str) -> None:
    """Set the mode of a FEATURE. "*" means every feature without a mode of its own.

    FEATURE is the name in `trueup rollout list` and in the decorators.

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
@limit_option(50, 1000)
@json_option
def history(limit: int, as_json: bool) -> None:
    """List the changes of modes with their authors and reasons, newest first.

    \b
    Example:
      trueup rollout history
    """
    with servers("postgres"), connect() as connection:
        changes = list_changes(connection, limit=limit)
    if as_json:
        print_json({"changes": changes})
        return
    rows = [
        (c.changed_at, _title(c.feature_name), c.mode_before or "settings", c.mode or "settings", c.changed_by, c.note)
        for c in changes
    ]
    print_table(("when (UTC)", "feature", "before", "since", "by", "note"), rows, empty="No mode has been changed yet.")


def _change(feature: str, mode: GateMode | None, *, note: str, by: str) -> None:
    with servers("postgres"), transaction() as connection:
        before = set_mode(connection, feature, mode, changed_by=by, note=note)
        known = {m.feature_name for m in list_modes(connection, known=_task_features())}
    unchanged = " (as before)" if before == mode else ""
    click.echo(f"{_title(feature)}: {mode or 'as in the settings'}{unchanged}")
    if mode and feature not in known - {feature} | {EVERY_FEATURE, *_task_features()}:
        note = f"Note: no task here has the feature {feature!r}. If no decorated view has it, check the name."
        click.echo(note, err=True)


def _task_features() -> list[str]:
    """Return the features of trueup's tasks and, under `celery -A proj trueup`, of the project's tasks."""
    from celery import current_app

    from trueup.tasks import TASK_MODULES

    for module in TASK_MODULES:
        import_module(module)
    return sorted({task.feature_name for task in current_app.tasks.values() if hasattr(task, "feature_name")})


def _title(feature: str) -> str:
    return "* (all others)" if feature == EVERY_FEATURE else feature
