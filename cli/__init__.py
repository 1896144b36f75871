"""`trueup`, one click group per noun.

Exit codes: 0 fine, 1 error, 2 wrong usage or input, 3 denied or (with `--fail-on-drift`) drift found.
"""

if not __name__.startswith("trueup."):
    raise ImportError(
        "This folder is the package trueup.cli. Imported as cli, its code would run a second time. "
        "Nothing was imported. Import trueup.cli."
    )

import sys
from importlib import import_module

import click

from trueup.errors import InvalidInputError, TrueupError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_DENIED = 3

# PostgreSQL's code for what the role may not do.

# Each command is imported when it is called: `trueup --help` need not load Celery or SQLAlchemy.
COMMANDS = {
    "up": ("trueup.cli.up", "Run database, Redis, workers and beat in the foreground."),
    "api": ("trueup.cli.api", "Serve the HTTP API in the foreground."),
    "db": ("trueup.cli.db.commands", "Set the database up."),
    "tokens": ("trueup.cli.tokens", "Show and check a user's tokens, and grant more."),
    "status": ("trueup.cli.status", "How the gate has been doing, and what to look at."),
    "holds": ("trueup.cli.holds", "Tokens set aside for running tasks."),
    "queues": ("trueup.cli.queues", "Messages that no worker could work on."),
    "usage": ("trueup.cli.usage", "A user's rows in the AI usage log."),
    "reconcile": ("trueup.cli.reconcile", "Compare every counter with the usage log, and correct it."),
    "drift": ("trueup.cli.drift.commands", "Reports of what reconciling found."),
    "rollout": ("trueup.cli.rollout", "How strict the gate is, feature by feature."),
    "alerts": ("trueup.cli.alerts", "What operators are told of, and whether it reaches them."),
    "run": ("trueup.cli.run", "Enqueue a real AI task."),
    "doctor": ("trueup.cli.doctor", "Check that everything is in place, and say what to do about what is not."),
    "settings": ("trueup.cli.settings", "List the settings and where they stand."),
    "demo": ("trueup.cli.demo", "Show everything on an embedded stack, in under a minute."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use; errors of trueup end in one message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[name][0]), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except InvalidInputError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(EXIT_USAGE)
        except TrueupError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except Exception as error:
            refusal = _refusal_of_the_database(error)
            if refusal is None:
                raise
            click.echo(f"Error: {refusal}", err=True)
            ctx.exit(EXIT_ERROR)


def _refusal_of_the_database(error: Exception) -> str | None:
    """Return what to say of an error that the database gave and that will not pass by itself; None: it is another one.

    Its own text would show SQL, and rows of the host's.
    """
    if "sqlalchemy" not in sys.modules:
        return None
    from psycopg.errors import InsufficientPrivilege
    from sqlalchemy.exc import DBAPIError

    from trueup.database.driver_errors import reason_of
    from trueup.database.engine import describe_database

    if not isinstance(error, DBAPIError):
        return None
    denied = isinstance(error.orig, InsufficientPrivilege)
    remedy = "Grant it to trueup's role" if denied else "Compare the host's tables with [host] in trueup.toml"
    return (
        f"The database at {describe_database()} refused: {reason_of(error)}. What was written before stays. "
        f"{remedy}, then run `trueup db init`, and this again."
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trueup", prog_name="trueup")
def main() -> None:
    """Make AI token budgets true: gate, record and reconcile.

    \b
    Example:
      trueup up                        # database, Redis, worker and beat, all embedded
      trueup run qa --user 1 page.txt --wait
      trueup drift report
    """
