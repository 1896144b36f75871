"""`trueup usage`: a user's rows in the AI usage log, and the code whose calls would be missing from it."""

from pathlib import Path

import click

from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_ERROR, SuggestingGroup
from trueup.cli.options import USER, json_option, limit_option, require_user, servers
from trueup.cli.output import print_json, print_table
from trueup.database.retry import retrying
from trueup.settings.settings import get_settings
from trueup.usage.log import list_usage


@click.group(cls=SuggestingGroup)
def usage() -> None:
    """List a user's rows in the usage log, and code whose calls would be missing from it.

    \b
    Example:
      trueup usage list 42
      trueup usage find-unmetered src
    """


@usage.command("list")
@click.argument("user", type=USER)
@limit_option(50, 10_000)
@json_option
def list_(user: UserId, limit: int, as_json: bool) -> None:
    """List USER's newest rows in the usage log, of the host and of trueup's tasks.

    \b
    Example:
      trueup usage list 42 --limit 10
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


@usage.command("find-unmetered")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@json_option
@click.pass_context
def find_unmetered_(ctx: click.Context, path: Path, as_json: bool) -> None:
    """List where the code in PATH calls a model without trueup.

    It reads Python files and runs none of their code. It finds clients of OpenAI, Anthropic, Gemini, pydantic-ai,
    LangChain and LlamaIndex without trueup's HTTP client, calls of LiteLLM, and WebSockets. Exit code 1: it found some.

    \b
    Example:
      trueup usage find-unmetered src
    """
    from trueup.llm.transport.unmetered import find_unmetered

    found = find_unmetered(path)
    if as_json:
        print_json({"calls": found})
    else:
        rows = [(f"{call.file}:{call.line}", call.call, call.remedy) for call in found]
        print_table(("place", "call", "remedy"), rows, empty=f"No unmetered call was found in {path}.")
    if found:
        ctx.exit(EXIT_ERROR)
