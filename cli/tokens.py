"""`trueup tokens`: a user's tokens, from the usage log."""

import click

from trueup.accounts.account import Account, read_account
from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED
from trueup.cli.context import TOKENS, USER, json_option, servers
from trueup.cli.grants import grant, grants, import_payments_, revoke
from trueup.cli.output import print_facts, print_json
from trueup.database.retry import retrying
from trueup.errors import UnknownUserError
from trueup.gate.decision import check_access


@click.group()
def tokens() -> None:
    """Show and check a user's tokens, and grant more.

    \b
    Example:
      trueup tokens show 42
      trueup tokens check 42 --tokens 1500
    """


for _command in (grant, grants, revoke, import_payments_):
    tokens.add_command(_command)


@tokens.command()
@click.argument("user", type=USER)
@json_option
def show(user: UserId, as_json: bool) -> None:
    """Show what USER's subscription includes, what is consumed, held and left, and the legacy counter's drift.

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
@click.option("--tokens", "estimate", type=TOKENS, default=1, show_default=True, help="How many the work would need.")
@click.option("--feature", default="AI Feature", show_default=True, help="What the message calls the work.")
@json_option
@click.pass_context
def check(ctx: click.Context, user: UserId, estimate: int, feature: str, as_json: bool) -> None:
    """Say whether USER may run AI work of that size now; reserves nothing. Exit code 3: denied.

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
        print_facts(
            {
                "verdict": verdict,
                "message": access["message"],
                "available": access["tokens_available"],
                "remaining": access["tokens_remaining"],
                "held": access["tokens_held"],
            }
        )
    if not access["has_access"]:
        ctx.exit(EXIT_DENIED)


def _facts(account: Account) -> dict[str, object]:
    return {
        "user": str(account.user_id),
        "active": account.is_active,
        "window_start": account.window_start,
        "end_date": account.end_date,
        "days_remaining": account.days_remaining,
        "original": account.original,
        "consumed": account.consumed,
        "remaining": account.remaining,
        "held": account.held,
        "available": account.available,
        "counter": account.counter,
        "drift": account.drift,
    }
