"""`trueup result`: the result of a task that was enqueued earlier."""

import sys

import click
from celery.result import AsyncResult

from trueup.cli import EXIT_ERROR
from trueup.cli.client import celery_client
from trueup.cli.options import json_option, servers
from trueup.cli.output import print_json
from trueup.cli.run import show_result
from trueup.settings.settings import get_settings


@click.command()
@click.argument("task_id")
@json_option
def result(task_id: str, as_json: bool) -> None:
    """Show the result, denial or error of the task TASK_ID. Exit code 3: denied. 1: it failed, or has no result.

    \b
    Example:
      trueup result 6f1c0e9a-3f0c-4d5b-9b8e-2f3a90c1b7de
    """
    with servers("redis"), celery_client(get_settings()) as app:
        # Errors are rebuilt as the tasks' own classes only if their modules are loaded.
        app.loader.import_default_modules()
        found = AsyncResult(task_id, app=app)
        state = str(found.state)
        if found.ready():
            sys.exit(show_result(found, state, as_json))
    if as_json:
        print_json({"task_id": task_id, "state": state})
    else:
        click.echo(
            f"Task {task_id} has no result (state {state}): it has not ended, its result has expired, or the id is "
            "wrong. `trueup doctor` says whether a worker runs.",
            err=True,
        )
    sys.exit(EXIT_ERROR)
