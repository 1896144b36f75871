"""`trueup up`: the embedded servers, the workers and the beat, as one thing to start and to stop."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

from trueup.settings.settings import Settings
from trueup.stack.errors import StackAlreadyRunningError, explained
from trueup.stack.layout import Layout, prepare_layout
from trueup.stack.leases import Lease
from trueup.stack.locks import FileLock
from trueup.stack.records import ChildRecords, reap_leftovers
from trueup.stack.running import StackUrls, leased_stack
from trueup.stack.supervisor.commands import API, Command, embedded_settings, stack_commands
from trueup.stack.supervisor.crew import Crew, Policy
from trueup.stack.supervisor.merged_log import MergedLog
from trueup.stack.supervisor.signals import StopRequests


def run_stack(
    settings: Settings,
    *,
    commands: Sequence[Command] | None = None,
    before_commands: Callable[[StackUrls], None] | None = None,
    policy: Policy | None = None,
    output: TextIO | None = None,
) -> None:
    """Run the stack until Ctrl-C, SIGTERM or SIGHUP; a second one ends it fast, a third at once.

    `before_commands` is called once the servers answer (migrations go there). `commands` defaults
    to the table in `commands.py`, of which the API is left out when it has no key to check tokens
    with, `output` to standard output. Raises `StackAlreadyRunningError`,
    `StackError` when a server can't be run, and `ChildFailedError` when a process keeps dying.
    """
    policy = policy or Policy()
    layout = prepare_layout(settings)
    table = commands if commands is not None else commands_of(settings, layout.home)
    log = MergedLog(output or sys.stdout, [command.name for command in table])
    with _only_one(layout), StopRequests() as requests:
        records = ChildRecords(layout.run / "children.json")
        # Before anything is started: the old workers must not share the queues with the new ones.
        reap_leftovers(records, layout.home, policy.grace_seconds, log.say)
        with leased_stack(settings) as (urls, leases):
            log.say(f"PostgreSQL and Redis are ready (home: {layout.home})")
            if commands is None:
                log.say(about_the_model(settings))
                log.say(about_the_api(settings))
            if before_commands:
                before_commands(urls)
            environment = _environment(layout.home, urls) | embedded_settings(settings)
            crew = Crew(table, environment, records, log, policy)
            with explained("trueup up", layout.home):
                crew.run(requests, tend=lambda: _revive(leases, log))
        log.say("stopped")


def commands_of(settings: Settings, home: Path) -> Sequence[Command]:
    """Return what `trueup up` runs: all of the table, but the API only with a key to check tokens with."""
    return [command for command in stack_commands(home) if command.name != API or serves_api(settings)]


def serves_api(settings: Settings) -> bool:
    """Return whether the stack serves the API: it has a key to check tokens with, or is a demo."""
    return settings.api.has_key or settings.api.demo


def about_the_model(settings: Settings) -> str:
    """Say which model provider answers AI tasks."""
    if embedded_settings(settings):
        return (
            "model provider: offline, so answers are made up. For real ones set TRUEUP_MODEL_PROVIDER=openai and "
            "TRUEUP_OPENAI_API_KEY"
        )
    if settings.model_provider is None:
        return "model provider: none. AI tasks fail until TRUEUP_MODEL_PROVIDER is set (see `trueup settings`)"
    return f"model provider: {settings.model_provider}"


def about_the_api(settings: Settings) -> str:
    """Say where the API will be, or why it is not served."""
    if not serves_api(settings):
        return (
            "the HTTP API is not served: there is no key to check tokens with. Set TRUEUP_API__JWT_SECRET, or on this "
            "machine alone TRUEUP_API__DEMO=true (see `trueup api --help`)"
        )
    demo = "; demo: the bearer token is the user id, nobody is authenticated" if settings.api.demo else ""
    return f"the HTTP API will be at http://{settings.api.host}:{settings.api.port}{demo}"


def _revive(leases: Sequence[Lease], log: MergedLog) -> None:
    for lease in leases:
        if lease.revive():
            log.say(f"{lease.service} had died and was started again; its log says why")


@contextmanager
def _only_one(layout: Layout) -> Iterator[None]:
    """Hold the home's up lock. Raises `StackAlreadyRunningError` when another process does."""
    path = layout.run / "up.lock"
    lock = FileLock(path)
    try:
        with explained("trueup up", path):
            if not lock.try_exclusive():
                raise StackAlreadyRunningError(str(layout.home), _pid_in(path))
            path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def _pid_in(path: Path) -> int | None:
    """Return the holder's pid; None in the moment between its lock and its note."""
    with suppress(OSError, ValueError):
        pid = int(path.read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def _environment(home: Path, urls: StackUrls) -> dict[str, str]:
    added = {
        "TRUEUP_HOME": str(home),
        "TRUEUP_DATABASE_URL": urls.database_url,
        "TRUEUP_BROKER_URL": urls.broker_url,
        "PYTHONUNBUFFERED": "1",  # or lines would arrive in blocks
    }
    return dict(os.environ) | {name: value for name, value in added.items() if value}
