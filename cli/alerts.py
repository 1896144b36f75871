"""`trueup alerts`: list, send and test alerts."""

import click

from trueup.cli import EXIT_DENIED, EXIT_ERROR, SuggestingGroup
from trueup.cli.options import json_option, limit_option, servers
from trueup.cli.output import print_json, print_table
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.monitoring.alerts import list_alerts, raise_all, raise_test
from trueup.reconcile.missed_runs import find_missed_runs
from trueup.settings.settings import get_settings

GAPS = ("missed", "missed_deep")


@click.group(cls=SuggestingGroup)
def alerts() -> None:
    """List, send and test alerts.

    \b
    Example:
      trueup alerts list
      trueup alerts test
    """


@alerts.command("list")
@limit_option(50, 1000)
@click.option("--waiting", is_flag=True, help="Only alerts that no channel has received yet.")
@json_option
def list_command(limit: int, waiting: bool, as_json: bool) -> None:
    """List alerts, newest first, with the attempts to send them and the last error.

    \b
    Example:
      trueup alerts list --waiting
    """
    with servers("postgres"), connect() as connection:
        found = list_alerts(connection, statuses=("waiting", "failed") if waiting else (), limit=limit)
    if as_json:
        print_json({"alerts": found})
        return
    print_table(
        ("alert", "what", "channel", "status", "attempts", "raised (UTC)", "sent (UTC)", "error"),
        [
            (
                *(alert.key, alert.payload["data"].get("message", ""), alert.channel, alert.status, alert.attempts),
                *(alert.created_at, alert.sent_at, alert.error),
            )
            for alert in found
        ],
        empty="No alerts.",
    )


@alerts.command()
def test() -> None:
    """Send a test alert to each channel now, and report whether the channel received it.

    \b
    Example:
      trueup alerts test
    """
    from trueup.tasks.alerts import deliver

    titles = get_settings().alerts.channels
    if not titles:
        raise TrueupError("No alert can be sent. Set TRUEUP_ALERTS__WEBHOOK_URL or TRUEUP_ALERTS__APPRISE_URLS.")
    with servers("postgres"):
        with connect() as connection:
            claimed = raise_test(connection)
        failures = {alert.channel: deliver(alert, retry=False) for alert in claimed}
    for channel, reason in failures.items():
        click.echo(f"{titles[channel]}: {'received' if reason is None else f'not received: {reason}'}")
    if any(failures.values()):
        raise TrueupError("Not every channel received the test. Correct the settings of alerts, and run this again.")


@alerts.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Raise and send alerts that are due, as beat does each minute.

    Exit code 3: reconcile runs, or deep runs, are overdue. A cron job on another machine also detects with it that beat
    is down.

    \b
    Example:
      trueup alerts check
    """
    from trueup.tasks.alerts import send_due

    with servers("postgres"):
        raised = retrying(raise_all)
        done = {"raised": raised, **send_due()}
        with connect() as connection:
            missed = {gap.kind: gap for gap in find_missed_runs(connection)}
    if as_json:
        gaps = {f"{kind}_seconds": missed[kind].seconds if kind in missed else None for kind in GAPS}
        print_json({**done, **gaps})
    else:
        click.echo(f"{done['raised']} raised, {done['sent']} sent, {done['failed']} not received.")
        for gap in missed.values():
            click.echo(gap.message)
    if missed:
        ctx.exit(EXIT_DENIED)
    if done["failed"]:
        ctx.exit(EXIT_ERROR)
