"""`trueup holds`: the tokens that running tasks reserve."""

import click

from trueup.accounts.user_ids import UserId
from trueup.cli import SuggestingGroup
from trueup.cli.options import USER, json_option, limit_option, require_user, servers
from trueup.cli.output import print_json, print_table
from trueup.database.retry import retrying
from trueup.gate.holds import list_holds


@click.group(cls=SuggestingGroup)
def holds() -> None:
    """List the tokens that running tasks reserve.

    \b
    Example:
      trueup holds list
    """


@holds.command("list")
@click.option("--user", type=USER, help="Only this user.")
@click.option("--all", "every_status", is_flag=True, help="Ended holds too.")
@limit_option(100, 10_000)
@json_option
def list_(user: UserId | None, every_status: bool, limit: int, as_json: bool) -> None:
    """List open holds, newest first.

    \b
    Example:
      trueup holds list
      trueup holds list --user 42 --all
    """
    with servers("postgres"):
        retrying(lambda connection: require_user(connection, user))
        rows = retrying(lambda connection: list_holds(connection, user_id=user, every_status=every_status, limit=limit))
    if as_json:
        print_json({"holds": rows})
        return
    print_table(
        ("user", "feature", "status", "reserved", "charged", "left", "opened (UTC)", "expires (UTC)", "owner", "task"),
        [
            (
                *(str(row.user_id), row.feature_name, row.status, row.tokens_reserved, row.tokens_charged),
                *(row.tokens_left, row.opened_at, row.expires_at, row.owner, row.task_id),
            )
            for row in rows
        ],
        empty="No holds." if every_status else "No open holds.",
    )
