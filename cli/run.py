"""`trueup run`: enqueue a real AI task from a file."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trueup.accounts.user_ids import UserId
from trueup.cli.context import USER, json_option, servers
from trueup.cli.enqueue import finish
from trueup.errors import InvalidInputError
from trueup.extras import require_extra
from trueup.settings.settings import get_settings

FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
Command = Callable[..., Any]


def common_options(command: Command) -> Command:
    """Add what all commands take."""
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
    """Enqueue a real AI task; it passes the gate in the worker. Exit code 3: denied. Needs the extra [features].

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
    _submit("trueup.generate_qa", user, arguments, wait, timeout, as_json)


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
    _submit("trueup.extract_products", user, arguments, wait, timeout, as_json)


@run.command()
@common_options
def dm(file: Path, user: UserId, wait: bool, timeout: int, as_json: bool) -> None:
    """Answer an Instagram comment: a JSON FILE with the webhook's "event" and the action's "config".

    \b
    Example:
      trueup run dm --user 1 --wait examples/comment_product.json
    """
    content = _read_object(file, needed=("event", "config"), example="comment_product.json")
    _submit("trueup.send_instagram_dm", user, content, wait, timeout, as_json)


@run.command()
@common_options
def reply(file: Path, user: UserId, wait: bool, timeout: int, as_json: bool) -> None:
    """Answer a customer's message: a JSON FILE with "message" and, if there are any, "history" and "business".

    \b
    Example:
      trueup run reply --user 1 --wait examples/chat.json
    """
    content = _read_object(file, needed=("message",), allowed=("history", "business"), example="chat.json")
    _submit("trueup.reply_to_message", user, content, wait, timeout, as_json)


@run.command()
@common_options
@click.option("--question", required=True, help="What is asked.")
def ask(file: Path, user: UserId, question: str, wait: bool, timeout: int, as_json: bool) -> None:
    """Answer a question from a text FILE, whose paragraphs are the passages; an empty one: from the model's knowledge.

    \b
    Example:
      trueup run ask --user 1 --question "Are returns free?" --wait examples/help_en.txt
    """
    passages = [passage.strip() for passage in re.split(r"\n\s*\n", _read_text(file))]
    arguments = {"question": question, "context": [passage for passage in passages if passage]}
    _submit("trueup.ask_question", user, arguments, wait, timeout, as_json)


@run.command()
@common_options
@click.option("--name", help="The business's name.")
@click.option("--description", help="What it sells, where it delivers.")
def prompt(
    file: Path, user: UserId, name: str | None, description: str | None, wait: bool, timeout: int, as_json: bool
) -> None:
    """Make a better prompt of a draft in a text FILE.

    \b
    Example:
      trueup run prompt --user 1 --name "Kestrel & Pine" --wait examples/prompt_draft.txt
    """
    arguments = {"prompt": _read_text(file), "business": {"name": name, "description": description}}
    _submit("trueup.generate_prompt", user, arguments, wait, timeout, as_json)


def _read_object(file: Path, *, needed: tuple[str, ...], allowed: tuple[str, ...] = (), example: str) -> dict[str, Any]:
    """Return the file's JSON object. Raises `InvalidInputError` when it has other parts than those."""
    written = _read_text(file)
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file}: no JSON ({error}). Correct the file.") from None
    if not isinstance(content, dict) or not set(needed) <= set(content) <= {*needed, *allowed}:
        parts = " and ".join(f'"{part}"' for part in needed)
        more = " and perhaps " + ", ".join(f'"{part}"' for part in allowed) if allowed else ""
        raise InvalidInputError(f"{file}: give an object with {parts}{more}, as in examples/{example}")
    return content


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
    require_extra("features", f"Task {task}", consequence="Nothing was enqueued.")
    user_id = user if isinstance(user, int) else str(user)
    with servers("postgres", "redis"):
        finish(get_settings(), task, {"user_id": user_id, **arguments}, wait=wait, timeout=timeout, as_json=as_json)
