"""`trueup tokens`: a user's tokens from the usage log, and grants on top of the plan."""

from dataclasses import asdict
from datetime import datetime, timedelta

import click

from trueup.accounts.account import Account, read_account
from trueup.accounts.grants import check_tokens, grant_tokens, list_grants, revoke_grant
from trueup.accounts.payments import import_payments
from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED, SuggestingGroup
from trueup.cli.options import (
    NUMBER,
    SINCE,
    TOKENS,
    USER,
    Parsed,
    by_option,
    grant_options,
    json_option,
    parse_count,
    reason_option,
    require_user,
    servers,
    time_of,
)
from trueup.cli.output import print_facts, print_json, print_table, show
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.errors import UnknownUserError
from trueup.gate.decision import check_access
from trueup.settings.settings import get_settings

SIZE = Parsed("tokens", lambda value: parse_count(value, check_tokens))


@click.group(cls=SuggestingGroup)
def tokens() -> None:
    """Show and check a user's tokens, and grant more.

    \b
    Example:
      trueup tokens show 42
      trueup tokens check 42 --tokens 1500
    """


@tokens.command("show")
@click.argument("user", type=USER)
@json_option
def show_(user: UserId, as_json: bool) -> None:
    """Show the tokens of USER that are included, consumed, held and left, and the drift of the host's counter.

    \b
    Example:
      trueup tokens show 42
    """
    with servers("postgres"):
        account = retrying(lambda connection: read_account(connection, user))
    if not account.subscribed:
        raise UnknownUserError(f"user: {user} has no subscription. Check the id, and the [host] mapping.")
    facts = _facts(account)
    if as_json:
        print_json(facts)
    else:
        print_facts({name.replace("_", " "): value for name, value in facts.items()})


@tokens.command()
@click.argument("user", type=USER)
@click.option("--tokens", "estimate", type=TOKENS, default=1, show_default=True, help="The tokens that the work needs.")
@click.option("--feature", default="AI Feature", show_default=True, help="The name of the work in the message.")
@json_option
@click.pass_context
def check(ctx: click.Context, user: UserId, estimate: int, feature: str, as_json: bool) -> None:
    """Check whether USER may run AI work of that size now. Reserves nothing. Exit code 3: denied.

    \b
    Example:
      trueup tokens check 42 --tokens 1500
    """
    with servers("postgres"):
        access = retrying(lambda connection: check_access(connection, user, estimate, feature))
    if as_json:
        print_json(access)
    else:
        verdict = "allowed" if access["has_access"] else f"denied: {access['reason']}"
        facts = {"available": access["tokens_available"], "remaining": access["tokens_remaining"]}
        print_facts({"verdict": verdict, "message": access["message"], **facts, "held": access["tokens_held"]})
    if not access["has_access"]:
        ctx.exit(EXIT_DENIED)


@tokens.command()
@click.argument("user", type=USER)
@click.argument("size", metavar="TOKENS", type=SIZE)
@grant_options
@by_option
@json_option
def grant(
    user: UserId, size: int, reason: str, reference: str, expires: datetime | None, by: str, as_json: bool
) -> None:
    """Grant USER more TOKENS on top of the plan. The same reference grants only once.

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
        print_json(asdict(given))
    elif given.already:
        click.echo(f"Already granted: grant {given.id}. Nothing was added.")
    else:
        click.echo(
            f"Granted {show(size)} tokens to user {user}: grant {given.id}. The gate counts them at once. The host's "
            f"counter shows them after the next reconcile run (`trueup reconcile --user {user}`)."
        )


@tokens.command()
@click.argument("user", type=USER)
@json_option
def grants(user: UserId, as_json: bool) -> None:
    """List USER's grants, newest first, with the used and remaining tokens of each.

    Tokens are used in this order: grants with an expiry, soonest first; the plan; other grants, oldest first.

    \b
    Example:
      trueup tokens grants 42
    """
    with servers("postgres"):
        retrying(lambda connection: require_user(connection, user))
        found = retrying(lambda connection: list_grants(connection, user))
    if as_json:
        print_json({"user": str(user), "grants": found})
        return
    print_table(
        ("grant", "status", "tokens", "used", "left", "granted (UTC)", "expires (UTC)", "by", "reference", "reason"),
        [
            (
                *(row.id, row.status, row.tokens, row.tokens_used, row.tokens_left),
                *(row.granted_at, row.expires_at, row.granted_by, row.reference),
                row.reason if row.revoke_reason is None else f"{row.reason}; revoked: {row.revoke_reason}",
            )
            for row in found
        ],
        empty="No grants.",
    )


@tokens.command()
@click.argument("user", type=USER)
@click.argument("grant_id", metavar="GRANT", type=NUMBER)
@reason_option
@by_option
@json_option
def revoke(user: UserId, grant_id: int, reason: str, by: str, as_json: bool) -> None:
    """Take back the remaining tokens of USER's GRANT. Usage that the grant has paid for stays paid.

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


@tokens.command("import-payments")
@click.option("--since", type=SINCE, help="Only payments since a time: 2026-11-01, 24h, 7d.")
@click.option("--dry-run", is_flag=True, help="List the payments. Grant nothing.")
@by_option
@json_option
def import_payments_(since: datetime | timedelta | None, dry_run: bool, by: str, as_json: bool) -> None:
    """Grant the token packs that users bought in their current periods, once for each payment.

    A pack is a paid token plan other than the subscription's. The mapping of payments is [host.payment].

    \b
    Example:
      trueup tokens import-payments --since 7d --dry-run
    """
    with servers("postgres"), connect() as connection:
        found = import_payments(connection, get_settings().host, by=by, since=time_of(since), dry_run=dry_run)
    if as_json:
        print_json({"payments": found})
        return
    print_table(
        ("user", "tokens", "paid (UTC)", "reference", "outcome", "grant"),
        [
            (str(row.user_id), row.tokens, row.paid_at, row.reference, row.outcome.replace("_", " "), row.grant_id)
            for row in found
        ],
        empty="No token packs were bought.",
    )


def _facts(account: Account) -> dict[str, object]:
    names = ("original", "consumed", "remaining", "held", "available", "counter", "drift")
    return {
        "user": str(account.user_id),
        "active": account.is_active,
        "unlimited": account.unlimited,
        "window_start": account.window_start,
        "end_date": account.end_date,
        "days_remaining": account.days_remaining,
        **{name: getattr(account, name) for name in names},
    }
