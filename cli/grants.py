"""`trueup tokens grant`, `grants`, `revoke` and `import-payments`: tokens on top of plans."""

from datetime import UTC, datetime, timedelta

import click

from trueup.accounts.grants import check_tokens, grant_tokens, list_grants, revoke_grant
from trueup.accounts.payments import import_payments
from trueup.accounts.user_ids import UserId
from trueup.cli.audit import END, by_option
from trueup.cli.context import USER, Parsed, json_option, parse_count, servers
from trueup.cli.output import print_json, print_table, show
from trueup.cli.reports.options import SINCE
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.settings.settings import get_settings

GRANT = click.IntRange(1, 2**63 - 1)
SIZE = Parsed("tokens", lambda value: parse_count(value, check_tokens))


@click.command()
@click.argument("user", type=USER)
@click.argument("size", metavar="TOKENS", type=SIZE)
@click.option("--reason", required=True, help="Why, for the audit.")
@click.option("--reference", required=True, help="What it is for, such as a payment's id; it grants once.")
@click.option("--expires", type=END, help="When what is left of it lapses; by default never.")
@by_option
@json_option
def grant(
    user: UserId, size: int, reason: str, reference: str, expires: datetime | None, by: str, as_json: bool
) -> None:
    """Give USER so many TOKENS on top of the plan. Run again with the same reference, it gives them once.

    \b
    Example:
      trueup tokens grant 42 500 --reason "sorry for the outage" --reference ticket-77 --expires 2027-01-31
    """
    with servers("postgres"):
        given = retrying(
            lambda connection: grant_tokens(
                connection, user, size, reason=reason, reference=reference, by=by, expires_at=expires
            )
        )
    if as_json:
        print_json(given)
    elif given.already:
        click.echo(f"Already granted: grant {given.id}. Nothing was added.")
    else:
        click.echo(f"Granted {show(size)} tokens to user {user}: grant {given.id}.")


@click.command()
@click.argument("user", type=USER)
@json_option
def grants(user: UserId, as_json: bool) -> None:
    """List USER's grants, newest first, with what is used and left of each.

    Used first is what expires soonest, then the plan, then grants without an expiry, oldest first.

    \b
    Example:
      trueup tokens grants 42
    """
    with servers("postgres"):
        found = retrying(lambda connection: list_grants(connection, user))
    if as_json:
        print_json(found)
        return
    print_table(
        ("grant", "status", "tokens", "used", "left", "granted (UTC)", "expires (UTC)", "by", "reference", "reason"),
        [
            (
                row.id,
                row.status,
                row.tokens,
                row.tokens_used,
                row.tokens_left,
                row.granted_at,
                row.expires_at,
                row.granted_by,
                row.reference,
                row.reason if row.revoke_reason is None else f"{row.reason}; revoked: {row.revoke_reason}",
            )
            for row in found
        ],
        empty="No grants.",
    )


@click.command()
@click.argument("user", type=USER)
@click.argument("grant_id", metavar="GRANT", type=GRANT)
@click.option("--reason", required=True, help="Why, for the audit.")
@by_option
@json_option
def revoke(user: UserId, grant_id: int, reason: str, by: str, as_json: bool) -> None:
    """Take back what is left of USER's GRANT; what it has paid for stays paid.

    \b
    Example:
      trueup tokens revoke 42 3 --reason "payment bounced"
    """
    with servers("postgres"):
        tokens = retrying(lambda connection: revoke_grant(connection, user, grant_id, reason=reason, by=by))
    if as_json:
        print_json({"id": grant_id, "tokens_taken_back": tokens or 0, "already": tokens is None})
    elif tokens is None:
        click.echo(f"Grant {grant_id} was revoked before. Nothing was changed.")
    else:
        click.echo(f"Revoked grant {grant_id}: {show(tokens)} tokens taken back.")


@click.command("import-payments")
@click.option("--since", type=SINCE, help="Only payments since a time, or for so long back: 2026-11-01, 24h, 7d.")
@click.option("--dry-run", is_flag=True, help="Only look: grant nothing.")
@by_option
@json_option
def import_payments_(since: datetime | timedelta | None, dry_run: bool, by: str, as_json: bool) -> None:
    """Give the token packs that users have bought in their windows as grants, each payment once.

    A pack is a paid token plan other than the subscription's. Payments are mapped under [host.payment].

    \b
    Example:
      trueup tokens import-payments --since 7d --dry-run
    """
    if isinstance(since, timedelta):
        since = datetime.now(UTC) - since
    with servers("postgres"), connect() as connection:
        found = import_payments(connection, get_settings().host, by=by, since=since, dry_run=dry_run)
    if as_json:
        print_json(found)
        return
    print_table(
        ("user", "tokens", "paid (UTC)", "reference", "outcome", "grant"),
        [
            (str(row.user_id), row.tokens, row.paid_at, row.reference, row.outcome.replace("_", " "), row.grant_id)
            for row in found
        ],
        empty="No token packs were bought.",
    )
