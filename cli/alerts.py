"""`trueup alerts`: what operators are told of, and whether it reaches them."""

import click

from trueup.cli import EXIT_DENIED, EXIT_ERROR
from trueup.cli.context import json_option, servers
from trueup.cli.output import print_json, print_table
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.monitoring.alerts import list_alerts, raise_all, raise_test
from trueup.reconcile.missed_runs import find_missed_runs
from trueup.settings.settings import get_settings

GAPS = ("missed", "missed_deep")


@click.group()
def alerts() -> None:
    """What operators are told of, and whether it reaches them.

    \b
    Example:
      trueup alerts list
      trueup alerts test
    """


@alerts.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@click.option("--waiting", is_flag=True, help="Only those that have not been received yet.")
@json_option
def list_command(limit: int, waiting: bool, as_json: bool) -> None:
    """List alerts, newest first, with how often each was sent and what went wrong.

    \b
    Example:
      trueup alerts list --waiting
    """
    with servers("postgres"), connect() as connection:
        found = list_alerts(connection, statuses=("waiting", "failed") if waiting else (), limit=limit)
    if as_json:
        print_json(found)
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
    """Send a test alert to each channel now, and say whether it was received.

    \b
    Example:
      trueup alerts test
    """
    from trueup.tasks.alerts import deliver

    titles = get_settings().alerts.channels
    if not titles:
        raise TrueupError("Alerts go nowhere: set TRUEUP_ALERTS__WEBHOOK_URL or TRUEUP_ALERTS__APPRISE_URLS.")
    with servers("postgres"):
        with connect() as connection:
            claimed = raise_test(connection)
        failures = {alert.channel: deliver(alert, retry=False) for alert in claimed}
    for channel, reason in failures.items():
        click.echo(f"{titles[channel]}: {'received' if reason is None else f'not received: {reason}'}")
    if any(failures.values()):
        raise TrueupError("Not every channel received the test. Correct the settings of alerts, and try again.")


@alerts.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Raise and send what is due, as beat does each minute.

    Exit code 3: no reconcile run, or no deep one, has ended for too long. From a cron job on another machine this also
    notices that beat itself is dead.

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
