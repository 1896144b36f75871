"""`trueup run`: enqueue a real AI task from a file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from billing.errors import InvalidInputError
from billing.settings import get_settings
from billing.users import UserId
from cli.context import USER, json_option, servers
from cli.waiting import finish

FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
Command = Callable[..., Any]


def common_options(command: Command) -> Command:
    """Add what all three commands take."""
    for option in (
        json_option,
        click.option("--timeout", type=click.IntRange(1, 86_400), default=300, show_default=True, help="Seconds."),
        click.option("--wait", is_flag=True, help="Show progress and the result; starts a worker if none runs."),
        click.option("--user", type=USER, required=True, help="Whose tokens are spent."),
        FILE,
    ):
        command = option(command)
    return command


@click.group()
def run() -> None:
    """Enqueue a real AI task; it passes the gate in the worker. Exit code 3: denied.

    \b
    Example:
      trueup run qa --user 1 --wait examples/help_en.txt
    """


@run.command()
@common_options
@click.option("--title", default="", help="The page's title.")
@click.option("--max-pairs", type=click.IntRange(1, 50), default=10, show_default=True, help="How many at most.")
def qa(file: Path, user: UserId, title: str, max_pairs: int, wait: bool, timeout: int, as_json: bool) -> None:
    """Make question and answer pairs from a text FILE (- for standard input).

    \b
    Example:
      trueup run qa --user 1 --max-pairs 5 --wait examples/help_en.txt
    """
    arguments = {"text": _read_text(file), "page_title": title, "max_pairs": max_pairs}
    _submit("tasks.generate_qa", user, arguments, wait, timeout, as_json)


@run.command()
@common_options
@click.option("--url", required=True, help="The page's address; links in it are relative to this.")
@click.option("--title", default="", help="The page's title.")
def products(file: Path, user: UserId, url: str, title: str, wait: bool, timeout: int, as_json: bool) -> None:
    """Extract the products of a page: an HTML FILE, or text if its name ends in .txt.

    \b
    Example:
      trueup run products --user 1 --url https://shop.example/stoves --wait examples/shop.html
    """
    kind = "text" if file.suffix == ".txt" else "html"
    arguments = {"url": url, "title": title, kind: _read_text(file)}
    _submit("tasks.extract_products", user, arguments, wait, timeout, as_json)


@run.command()
@common_options
def dm(file: Path, user: UserId, wait: bool, timeout: int, as_json: bool) -> None:
    """Answer an Instagram comment: a JSON FILE with the webhook's "event" and the action's "config".

    \b
    Example:
      trueup run dm --user 1 --wait examples/comment_product.json
    """
    written = _read_text(file)
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file}: no JSON ({error}). Correct the file.") from None
    if not isinstance(content, dict) or set(content) != {"event", "config"}:
        raise InvalidInputError(
            f'{file}: give an object with "event" and "config", as in examples/comment_product.json'
        )
    _submit("tasks.send_instagram_dm", user, content, wait, timeout, as_json)


def _read_text(file: Path) -> str:
    """Return the file's text. Raises `InvalidInputError` when it can't be read or is none."""
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{file}: not UTF-8 text. Convert it, or send another file.") from None
    except OSError as error:
        raise InvalidInputError(f"{file}: {error.strerror}") from None


def _submit(task: str, user: UserId, arguments: dict[str, Any], wait: bool, timeout: int, as_json: bool) -> None:
    user_id = user if isinstance(user, int) else str(user)
    with servers("postgres", "redis"):
        finish(get_settings(), task, {"user_id": user_id, **arguments}, wait=wait, timeout=timeout, as_json=as_json)
