"""Enqueueing a task and, if asked, waiting for it: progress on a terminal, then its result or why there is none."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from celery import Celery
from celery.exceptions import TimeoutError as ResultTimeoutError
from celery.result import AsyncResult

from trueup.cli import EXIT_DENIED, EXIT_ERROR
from trueup.cli.client import celery_client
from trueup.cli.output import print_json
from trueup.cli.progress import status_line
from trueup.errors import ServiceUnavailableError, TokensDenied, TrueupError
from trueup.settings.settings import Settings
from trueup.tasks.queues import AI_QUEUE

PING_SECONDS = 1.0
POLL_SECONDS = 0.1


def finish(
    settings: Settings, task: str, arguments: dict[str, Any], *, wait: bool, timeout: int, as_json: bool
) -> None:
    """Enqueue the task. With `wait`, show how it ends: exit code 0, 1 for an error, 3 for a denial.

    `timeout`: seconds to wait. Raises `ServiceUnavailableError` when Redis does not answer.
    """
    with celery_client(settings) as app:
        # The registered task and not only its name: so that its arguments are checked here already.
        app.loader.import_default_modules()
        result = app.tasks[task].apply_async(kwargs=arguments)
        if not wait:
            _say_enqueued(result, task, as_json)
            return
        sys.exit(_see_through(app, settings, result, timeout=timeout, as_json=as_json))


def _see_through(app: Celery, settings: Settings, result: AsyncResult, *, timeout: int, as_json: bool) -> int:
    """Wait for the task's end and show it. Returns the exit code."""
    ended = False
    try:
        with _some_worker(app, settings) as tend:
            state = _wait(result, timeout, tend)
            ended = True
            # Before a worker of ours is stopped: that takes seconds.
            return _show(result, state, as_json)
    except (KeyboardInterrupt, SystemExit, ServiceUnavailableError):
        if not ended:
            goes_on = f"Task {result.id} is not cancelled: it runs when a worker does."
            click.echo(f"Not waiting any more. {goes_on}", err=True)
        raise


def _say_enqueued(result: AsyncResult, task: str, as_json: bool) -> None:
    if as_json:
        print_json({"task_id": result.id, "task": task, "state": "ENQUEUED"})
    else:
        click.echo(f"Enqueued {task} as {result.id}. It runs when a worker does (`trueup up`).")


@contextmanager
def _some_worker(app: Celery, settings: Settings) -> Iterator[Callable[[], None]]:
    """Have a worker on the AI queue: one that runs, or on the embedded broker one for as long as this takes.

    Gives what is to be called now and then, to look after that worker.
    """
    if _is_consumed(app, AI_QUEUE):
        yield _nothing
    elif settings.broker_url is None:
        from trueup.stack.temporary import temporary_worker  # needs the extra of the embedded servers

        with temporary_worker(settings) as tend:
            yield tend
    else:
        click.echo(
            "No worker answers. Waiting for one: start it with "
            "`celery -A trueup.worker worker -Q trueup-ai -n trueup-ai@%h`.",
            err=True,
        )
        yield _nothing


class _ConsumedError(Exception):
    """Ends the collecting of answers: one is enough."""


def _is_consumed(app: Celery, queue: str) -> bool:
    """Return whether a worker answers that takes tasks from the queue; others answer too."""

    def look(answer: dict[str, list[dict[str, Any]]]) -> None:
        if any(found["name"] == queue for queues in answer.values() for found in queues):
            raise _ConsumedError

    try:
        app.control.inspect(timeout=PING_SECONDS, callback=look).active_queues()
    except _ConsumedError:
        return True
    return False


def _nothing() -> None:
    """Look after nobody."""


def _wait(result: AsyncResult, timeout: int, tend: Callable[[], None]) -> str:
    """Return the task's final state. Raises `TrueupError` when it has none in time."""
    deadline = time.monotonic() + timeout
    with status_line() as status:
        while not result.ready():
            if time.monotonic() > deadline:
                raise TrueupError(
                    f"Task {result.id} has not ended within {timeout} s (state {result.state}). It goes on; "
                    "wait longer with --timeout, and see whether a worker runs."
                )
            tend()
            status.show(f"{result.state} {result.id}")
            time.sleep(POLL_SECONDS)
    return str(result.state)


def _show(result: AsyncResult, state: str, as_json: bool) -> int:
    """Show the task's result, or why there is none. Returns the exit code."""
    try:
        value = result.get(timeout=PING_SECONDS)
    except TokensDenied as denied:
        if as_json:
            print_json({"task_id": result.id, "state": "DENIED", **denied.payload})
        else:
            click.echo(f"Denied: {denied}", err=True)
        return EXIT_DENIED
    except ResultTimeoutError:
        raise TrueupError(f"Task {result.id} ended as {state}, but its result is gone.") from None
    except Exception as error:  # noqa: BLE001 - whatever the task raised, of whatever type
        if as_json:
            print_json({"task_id": result.id, "state": state, "error": str(error), "type": type(error).__name__})
        else:
            click.echo(f"Error: the task failed ({type(error).__name__}): {error}", err=True)
        return EXIT_ERROR
    print_json({"task_id": result.id, "state": state, "result": value} if as_json else value)
    return 0
