"""`trueup run`: enqueue a real AI task from a file and, on request, wait for its result."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from celery import Celery
from celery.exceptions import TimeoutError as ResultTimeoutError
from celery.result import AsyncResult

from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_DENIED, EXIT_ERROR, SuggestingGroup
from trueup.cli.client import celery_client
from trueup.cli.options import USER, Command, json_option, servers
from trueup.cli.output import print_json
from trueup.cli.progress import status_line
from trueup.errors import InvalidInputError, ServiceUnavailableError, TokensDenied, TrueupError
from trueup.extras import require_extra
from trueup.settings.settings import Settings, get_settings
from trueup.tasks.queues import AI_QUEUE

PING_SECONDS = 1.0
# What Celery's states mean to a person who waits. Celery says PENDING of every task that no worker has started.
_WAITS_FOR = {"PENDING": "waiting for a worker", "STARTED": "running", "RETRY": "waiting to be tried again"}
POLL_SECONDS = 0.1
FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))


def common_options(command: Command) -> Command:
    """Add the argument and options of all `trueup run` commands."""
    for option in (
        json_option,
        click.option(
            "--timeout",
            type=click.IntRange(1, 86_400),
            default=300,
            show_default=True,
            help="The maximum wait in seconds.",
        ),
        click.option("--wait", is_flag=True, help="Wait, and show the result. Starts a worker if none runs."),
        click.option("--user", type=USER, required=True, help="The user whose tokens are spent."),
        FILE,
    ):
        command = option(command)
    return command


@click.group(cls=SuggestingGroup)
def run() -> None:
    """Enqueue a real AI task, which passes the gate in the worker. Exit code 3: denied. Needs the extra [features].

    \b
    Example:
      trueup run qa --user 1 --wait examples/help_en.txt
    """


@run.command()
@common_options
@click.option("--title", default="", help="The page's title.")
@click.option("--max-pairs", type=click.IntRange(1, 50), default=10, show_default=True, help="The maximum.")
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
@click.option("--url", required=True, help="The page's URL, the base of its relative links.")
@click.option("--title", default="", help="The page's title.")
def products(file: Path, user: UserId, url: str, title: str, wait: bool, timeout: int, as_json: bool) -> None:
    """Extract the products of a page from an HTML FILE, or from a text FILE if its name ends in .txt.

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
    """Answer an Instagram comment from a JSON FILE with the webhook's "event" and the action's "config".

    \b
    Example:
      trueup run dm --user 1 --wait examples/comment_product.json
    """
    content = _read_object(file, needed=("event", "config"), example="comment_product.json")
    _submit("trueup.send_instagram_dm", user, content, wait, timeout, as_json)


@run.command()
@common_options
def reply(file: Path, user: UserId, wait: bool, timeout: int, as_json: bool) -> None:
    """Answer a customer's message from a JSON FILE with "message" and, optionally, "history" and "business".

    \b
    Example:
      trueup run reply --user 1 --wait examples/chat.json
    """
    content = _read_object(file, needed=("message",), allowed=("history", "business"), example="chat.json")
    _submit("trueup.reply_to_message", user, content, wait, timeout, as_json)


@run.command()
@common_options
@click.option("--question", required=True, help="The question.")
def ask(file: Path, user: UserId, question: str, wait: bool, timeout: int, as_json: bool) -> None:
    """Answer a question from the paragraphs of a text FILE. With an empty FILE, the model uses its own knowledge.

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
@click.option("--description", help="The products and places of delivery.")
def prompt(
    file: Path, user: UserId, name: str | None, description: str | None, wait: bool, timeout: int, as_json: bool
) -> None:
    """Improve a draft of a prompt from a text FILE.

    \b
    Example:
      trueup run prompt --user 1 --name "Kestrel & Pine" --wait examples/prompt_draft.txt
    """
    arguments = {"prompt": _read_text(file), "business": {"name": name, "description": description}}
    _submit("trueup.generate_prompt", user, arguments, wait, timeout, as_json)


def _read_object(file: Path, *, needed: tuple[str, ...], allowed: tuple[str, ...] = (), example: str) -> dict[str, Any]:
    """Return the file's JSON object. Raises `InvalidInputError` for missing or unknown keys."""
    written = _read_text(file)
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file}: no JSON ({error}). Nothing was enqueued. Correct the file.") from None
    if not isinstance(content, dict) or not set(needed) <= set(content) <= {*needed, *allowed}:
        parts = " and ".join(f'"{part}"' for part in needed)
        more = " and optionally " + ", ".join(f'"{part}"' for part in allowed) if allowed else ""
        raise InvalidInputError(f"{file}: give an object with {parts}{more}, as in examples/{example}")
    return content


def _read_text(file: Path) -> str:
    """Return the file's text. Raises `InvalidInputError` if it can't be read or is no UTF-8."""
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{file}: not UTF-8 text. Nothing was enqueued. Convert the file.") from None
    except OSError as error:
        raise InvalidInputError(f"{file}: {error.strerror}") from None


def _submit(task: str, user: UserId, arguments: dict[str, Any], wait: bool, timeout: int, as_json: bool) -> None:
    require_extra("features", f"Task {task}", consequence="Nothing was enqueued.")
    user_id = user if isinstance(user, int) else str(user)
    with servers("postgres", "redis"):
        finish(get_settings(), task, {"user_id": user_id, **arguments}, wait=wait, timeout=timeout, as_json=as_json)


def finish(
    settings: Settings, task: str, arguments: dict[str, Any], *, wait: bool, timeout: int, as_json: bool
) -> None:
    """Enqueue the task. With `wait`, show its result; exit code 0, 1 for an error, 3 for a denial.

    `timeout`: the maximum wait in seconds. Raises `ServiceUnavailableError` when Redis does not answer.
    """
    with celery_client(settings) as app:
        # The registered task checks its arguments here; sending by name would not.
        app.loader.import_default_modules()
        result = app.tasks[task].apply_async(kwargs=arguments)
        if not wait:
            if as_json:
                print_json({"task_id": result.id, "task": task, "state": "ENQUEUED"})
            else:
                click.echo(f"Enqueued {task} as {result.id}. A worker runs it (`trueup up`).")
            return
        sys.exit(_wait_and_show(app, settings, result, timeout=timeout, as_json=as_json))


def _wait_and_show(app: Celery, settings: Settings, result: AsyncResult, *, timeout: int, as_json: bool) -> int:
    """Wait until the task has ended and show its result. Returns the exit code."""
    ended = False
    try:
        with _worker(app, settings) as supervise:
            state = _wait(result, timeout, supervise)
            ended = True
            # Before the block stops the temporary worker, which takes seconds.
            return show_result(result, state, as_json)
    except (KeyboardInterrupt, SystemExit, ServiceUnavailableError):
        if not ended:
            click.echo(f"The wait was stopped. Task {result.id} is not cancelled: a worker will run it.", err=True)
        raise


@contextmanager
def _worker(app: Celery, settings: Settings) -> Iterator[Callable[[], object]]:
    """Provide a worker for the AI queue: a running worker or, on the embedded broker, a temporary one.

    Yields a function to call while waiting. It raises `StackError` when the temporary worker has died.
    """
    if _is_consumed(app, AI_QUEUE):
        yield lambda: None
    elif settings.broker_url is None:
        from trueup.stack.temporary import temporary_worker  # needs the extra [embedded]

        with temporary_worker(settings) as supervise:
            yield supervise
    else:
        command = "celery -A trueup.worker worker -Q trueup-ai -n trueup-ai@%h"
        click.echo(f"No worker answers. Start one with `{command}`.", err=True)
        yield lambda: None


class _ConsumedError(Exception):
    """Stops the collection of answers after the first match."""


def _is_consumed(app: Celery, queue: str) -> bool:
    """Return whether a worker that consumes the queue answers."""

    def look(answer: dict[str, list[dict[str, Any]]]) -> None:
        if any(found["name"] == queue for queues in answer.values() for found in queues):
            raise _ConsumedError

    try:
        app.control.inspect(timeout=PING_SECONDS, callback=look).active_queues()
    except _ConsumedError:
        return True
    return False


def _wait(result: AsyncResult, timeout: int, supervise: Callable[[], object]) -> str:
    """Return the task's final state. Raises `TrueupError` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    with status_line() as show_status:
        while not result.ready():
            if time.monotonic() > deadline:
                raise TrueupError(
                    f"Task {result.id} has not ended within {timeout} s (state {result.state}). It continues. "
                    "Wait longer with --timeout, and check that a worker runs."
                )
            supervise()
            state = result.state
            show_status(f"{_WAITS_FOR.get(state, state)} (task {result.id})")
            time.sleep(POLL_SECONDS)
    return str(result.state)


def show_result(result: AsyncResult, state: str, as_json: bool) -> int:
    """Show the task's result, denial or error. Returns the exit code."""
    try:
        value = result.get(timeout=PING_SECONDS)
    except TokensDenied as denied:
        if as_json:
            print_json({"task_id": result.id, "state": "DENIED", **denied.payload})
        else:
            click.echo(f"Denied: {denied}", err=True)
        return EXIT_DENIED
    except ResultTimeoutError:
        raise TrueupError(f"Task {result.id} ended as {state}, but its result has expired.") from None
    except Exception as error:  # noqa: BLE001 - a task may raise any error
        if as_json:
            print_json({"task_id": result.id, "state": state, "error": str(error), "type": type(error).__name__})
        else:
            click.echo(f"Error: the task failed ({type(error).__name__}): {error}", err=True)
        return EXIT_ERROR
    print_json({"task_id": result.id, "state": state, "result": value} if as_json else value)
    return 0
