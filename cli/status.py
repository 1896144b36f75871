"""`trueup status`: the figures of the gate, and calls and messages for a person to check."""

from datetime import datetime, timedelta

import click

from trueup.cli.options import hours_since, json_option, servers, since_option
from trueup.cli.output import print_facts, print_json, print_table
from trueup.database.engine import connect
from trueup.gate.owed_charges import OwedCharge, list_owed_charges
from trueup.gate.provider_calls import UnrecordedCall, list_unrecorded_calls
from trueup.monitoring.status import Status, read_status
from trueup.usage.outbox import Effect, list_unresolved_effects


@click.command()
@since_option
@json_option
def status(since: datetime | timedelta, as_json: bool) -> None:
    """Show holds, charges, settlement lag, overdrafts, owed charges, and calls and messages of unknown outcome.

    \b
    Example:
      trueup status
      trueup status --since 1h --json
    """
    with servers("postgres"), connect() as connection:
        figures = read_status(connection, hours=hours_since(since))
        calls = list_unrecorded_calls(connection)
        owed = list_owed_charges(connection)
        effects = list_unresolved_effects(connection)
    if as_json:
        print_json({"status": figures, "unrecorded_calls": calls, "owed_charges": owed, "unknown_effects": effects})
        return
    print_facts(_facts(figures))
    _print_calls(calls)
    _print_owed(owed)
    _print_effects(effects)


def _facts(status: Status) -> dict[str, object]:
    lag = [status.settlement_lag_median_seconds, status.settlement_lag_p95_seconds]
    median, p95 = ("–" if seconds is None else f"{seconds:.2f} s" for seconds in lag)
    oldest = status.oldest_hold_seconds
    return {
        "open holds": status.open_holds,
        "tokens held": status.tokens_held,
        "oldest open hold": "–" if oldest is None else f"{oldest:.0f} s",
        "last reconcile (UTC)": status.last_reconcile,
        f"in the last {status.hours} h": "",
        "  charges": status.charges,
        "  tokens charged": status.tokens_charged,
        "  settlement lag, median": median,
        "  settlement lag, 95 %": p95,
        "  late charges": status.late_charges,
        "  tokens over their hold": status.tokens_over_hold,
        "  expired holds": status.expired_holds,
        "  observed denials": status.observed_denials,
        "  their tokens": status.observed_denial_tokens,
        "to check": "",
        "  users in overdraft": status.overdraft_users,
        "  overdraft tokens": status.overdraft_tokens,
        "  unrecorded calls": status.unrecorded_calls,
        "  their tokens, at most": status.unrecorded_tokens_bound,
        "  owed charges": status.owed_charges,
        "  tokens of owed charges": status.owed_tokens,
        "  charges not yet told to on_charge": status.charge_events,
        "  messages, perhaps sent": status.unknown_effects,
    }


def _print_calls(calls: list[UnrecordedCall]) -> None:
    if calls:
        click.echo("\nCalls that started and were never recorded. The provider may have billed each:")
        rows = [(str(c.user_id), c.tokens_bound, c.started_at, c.task_id, c.call_key) for c in calls]
        print_table(("user", "max. tokens", "started (UTC)", "task", "call"), rows)


def _print_owed(owed: list[OwedCharge]) -> None:
    if owed:
        click.echo("\nCharges whose row the usage log refused. Correct the reason; trueup tries again each minute:")
        rows = [(str(o.user_id), o.tokens, o.owed_since, o.tries, o.refusal) for o in owed]
        print_table(("user", "tokens", "owed since (UTC)", "tries", "refusal"), rows)


def _print_effects(effects: list[Effect]) -> None:
    if effects:
        click.echo("\nMessages that may have been sent:")
        rows = [(str(e.user_id), e.effect, e.updated_at, e.task_id) for e in effects]
        print_table(("user", "what", "tried (UTC)", "task"), rows)
