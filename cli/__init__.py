"""`trueup`, with one click command or group for each noun.

Exit codes: 0 success, 1 error, 2 wrong usage or input, 3 denied or (with `--fail-on-drift`) drift found.
"""

if not __name__.startswith("trueup."):
    raise ImportError(
        "This folder is the package trueup.cli. Imported as cli, its code would run a second time. "
        "Nothing was imported. Import trueup.cli."
    )

import difflib
import errno
import gc
import io
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import click

from trueup.errors import InvalidInputError, TrueupError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_DENIED = 3
# The output is a full disk, or a terminal that has gone.
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# A command is imported when it is called, so that `trueup --help` loads neither Celery nor SQLAlchemy.
COMMANDS = {
    "up": ("trueup.cli.up", "Run database, Redis, workers and beat in the foreground."),
    "api": ("trueup.cli.api", "Serve the HTTP API in the foreground."),
    "page": ("trueup.cli.page", "Print a link that opens the live page in a browser on this machine."),
    "db": ("trueup.cli.db.commands", "Set the database up, attach trueup to a host, or detach it."),
    "tokens": ("trueup.cli.tokens", "Show and check a user's tokens, and grant more."),
    "status": ("trueup.cli.status", "Show the figures of the gate, and calls and messages to check."),
    "holds": ("trueup.cli.holds", "List the tokens that running tasks reserve."),
    "queues": ("trueup.cli.queues", "List, requeue and drop messages that no worker could work on."),
    "usage": ("trueup.cli.usage", "List a user's rows in the AI usage log, and code whose calls would be missing."),
    "reconcile": ("trueup.cli.reconcile", "Compare every counter with the usage log, and correct it."),
    "drift": ("trueup.cli.drift.commands", "Report and review the drift that reconcile runs found."),
    "rollout": ("trueup.cli.rollout", "Show and set the gate's mode for each feature."),
    "alerts": ("trueup.cli.alerts", "List, send and test alerts."),
    "run": ("trueup.cli.run", "Enqueue a real AI task."),
    "result": ("trueup.cli.result", "Show the result of a task."),
    "doctor": ("trueup.cli.doctor", "Check settings, servers, tables and workers, with a remedy for each problem."),
    "settings": ("trueup.cli.settings", "List the settings and their values."),
    "demo": ("trueup.cli.demo", "Show all of trueup on an embedded stack, in under a minute."),
}


class SuggestingGroup(click.Group):
    """A group that names the nearest command when a name is misspelt."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near and "Did you mean" not in error.message:
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None
            raise


class LazyGroup(SuggestingGroup):
    """A group that imports its commands on use, and turns trueup's errors into one message and an exit code."""

    _is_whole_process = False

    def main(self, *args: Any, **options: Any) -> Any:
        self._is_whole_process = options.get("standalone_mode", True)
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        importing = _import_for_good if self._is_whole_process else import_module
        command: click.Command = getattr(importing(COMMANDS[name][0]), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        _replace_what_cannot_be_printed()
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno not in _OUTPUT_ERRORS:
                raise
            click.echo(f"Error: the output can't be written: {error.strerror}. Earlier writes are kept.", err=True)
            # What is still buffered can't be written either, and Python would complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(EXIT_ERROR)
        except TrueupError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(EXIT_USAGE if isinstance(error, InvalidInputError) else EXIT_ERROR)
        except Exception as error:
            message = _database_error(error)
            if message is None:
                raise
            click.echo(f"Error: {message}", err=True)
            ctx.exit(EXIT_ERROR)


def _import_for_good(module: str) -> ModuleType:
    """Import a module without collecting garbage, then or later, in what the import makes.

    It makes 100,000 objects, and all of them stay. To look through them again and again takes a third of a short
    command's time. In a process that does more than this command, it would also keep garbage of others.
    """
    if module not in sys.modules:
        gc.disable()
        try:
            import_module(module)
        finally:
            gc.freeze()
            gc.enable()
    return sys.modules[module]


def _replace_what_cannot_be_printed() -> None:
    """Print ? for characters that the output's encoding does not have. In UTF-8 there are none."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def _database_error(error: Exception) -> str | None:
    """Return the message for a permanent error of the database; None for any other error.

    The driver's own text would show SQL and rows of the host.
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
        f"The database at {describe_database()} refused: {reason_of(error)}. Earlier writes are kept. "
        f"{remedy}, then run `trueup db init`, and run this command again."
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
