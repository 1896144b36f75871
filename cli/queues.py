"""`trueup queues`: messages that no worker could work on."""

import base64
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import click

from trueup.cli import SuggestingGroup
from trueup.cli.client import celery_client
from trueup.cli.options import json_option, servers
from trueup.cli.output import print_json, print_table
from trueup.errors import InvalidInputError, NotFoundError
from trueup.settings.settings import get_settings
from trueup.worker.dead_letters import DeadLetter, drop_letters, list_letters, requeue_letters

_SHOWN_BYTES = 2_000


@click.group(cls=SuggestingGroup)
def queues() -> None:
    """Messages that no worker could work on.

    \b
    Example:
      trueup queues dead
    """


@queues.command()
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="How many at most.")
@json_option
def dead(limit: int, as_json: bool) -> None:
    """List the dead letters: messages that could not be read, or named a task that the worker does not have.

    The newest come first. Redis keeps the last 1,000.

    \b
    Example:
      trueup queues dead
      trueup queues dead --json
    """
    letters = _with_redis(lambda client: list_letters(client, limit=limit))
    if as_json:
        print_json({"letters": [asdict(letter) | {"preview": _preview(letter)} for letter in letters]})
        return
    print_table(
        ("letter", "at (UTC)", "queue", "task", "task id", "bytes", "reason"),
        [
            (one.id, one.at, one.queue, one.task or "-", one.task_id or "-", str(one.bytes), one.reason)
            for one in letters
        ],
        empty="No dead letters.",
    )
    if letters:
        click.echo("\ntrueup queues requeue LETTER    put it back at the end of its queue, once its cause is gone")
        click.echo("trueup queues drop LETTER       delete it")


def _choice(command: Callable[..., Any]) -> Callable[..., Any]:
    chosen = click.argument("letters", nargs=-1, metavar="LETTER...")(command)
    return click.option("--all", "every", is_flag=True, help="All dead letters.")(chosen)


@queues.command()
@_choice
def requeue(letters: tuple[str, ...], every: bool) -> None:
    """Put dead letters back at the end of their queues, unchanged. For a task that workers know now, say.

    \b
    Example:
      trueup queues requeue 3f2a90c1b7de
      trueup queues requeue --all
    """
    _take("Requeued", requeue_letters, letters, every)


@queues.command()
@_choice
def drop(letters: tuple[str, ...], every: bool) -> None:
    """Delete dead letters.

    \b
    Example:
      trueup queues drop 3f2a90c1b7de
      trueup queues drop --all
    """
    _take("Dropped", drop_letters, letters, every)


def _take(
    done: str,
    take: Callable[[Any, Collection[str] | None], list[DeadLetter]],
    letters: tuple[str, ...],
    every: bool,
) -> None:
    if every == bool(letters):
        raise InvalidInputError("letters: name dead letters, or give --all. `trueup queues dead` lists them.")
    taken = _with_redis(lambda client: take(client, None if every else letters))
    click.echo(f"{done}: {len(taken)}.")
    missed = sorted(set(letters) - {letter.id for letter in taken})
    if missed:
        raise NotFoundError(
            f"letters: {', '.join(missed)}: no such dead letter, or its message was too long to be kept whole."
        )


def _with_redis(ask: Callable[[Any], Any]) -> Any:
    with servers("redis"), celery_client(get_settings()) as app, app.connection_for_write() as connection:
        return ask(connection.default_channel.client)


def _preview(letter: DeadLetter) -> str:
    """Return the beginning of the message as text."""
    return base64.b64decode(letter.message)[:_SHOWN_BYTES].decode(errors="backslashreplace")
