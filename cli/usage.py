"""`trueup usage`: list a user's rows in the AI usage log."""

import click

from trueup.accounts.user_ids import UserId
from trueup.cli.options import USER, json_option, limit_option, require_user, servers
from trueup.cli.output import print_json, print_table
from trueup.database.retry import retrying
from trueup.settings.settings import get_settings
from trueup.usage.log import list_usage


@click.command()
@click.argument("user", type=USER)
@limit_option(50, 10_000)
@json_option
def usage(user: UserId, limit: int, as_json: bool) -> None:
    """List USER's newest rows in the usage log, of the host and of trueup's tasks.

    \b
    Example:
      trueup usage 42 --limit 10
    """
    mapping = get_settings().host
    with servers("postgres"):
        retrying(lambda connection: require_user(connection, user))
        rows = retrying(lambda connection: list_usage(connection, mapping, user, limit=limit))
    if as_json:
        print_json({"user": str(user), "rows": rows})
        return
    print_table(
        ("time (UTC)", "section", "model", "prompt", "completion", "total", "counts", "task"),
        [
            (
                *(row.created_at, row.section, row.model_name, row.prompt_tokens, row.completion_tokens),
                *(row.total_tokens, row.success, row.task_id),
            )
            for row in rows
        ],
        empty=f"The log has no rows of user {user}.",
    )
