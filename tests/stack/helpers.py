"""Homes, processes and deadlines for the tests of the embedded stack."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support.waiting import DEADLINE_SECONDS
from trueup.settings.settings import Settings
from trueup.stack.layout import Layout
from trueup.stack.processes import first_of, is_alive
from trueup.stack.servers.postgres import PostgresServer
from trueup.stack.servers.redis import RedisServer
from trueup.stack.waiting import wait_until

# A command that uses the stack: it prints "ready", and runs until its standard input is closed.
USER = """
import sys
from trueup.settings.settings import Settings
from trueup.stack import running_stack

with running_stack(Settings(home=sys.argv[1]), services=sys.argv[2].split(",")):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def temporary_home(under: Path | None = None) -> Iterator[Path]:
    """Give a home that root's PostgreSQL user can reach, unlike pytest's own folders. `under` None: the usual place."""
    folder = Path(tempfile.mkdtemp(prefix="trueup-test-", dir=under))
    folder.chmod(0o711)
    try:
        yield folder / "home"
    finally:
        for process in stack_processes(folder / "home"):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder)


def stack_settings(home: Path) -> Settings:
    return Settings(home=home, database_url=None, broker_url=None)


def servers(home: Path) -> tuple[PostgresServer, RedisServer]:
    layout = Layout(home=home)
    return PostgresServer(layout), RedisServer(layout)


def stack_processes(home: Path) -> list[psutil.Process]:
    """Return all living server processes of a home."""
    if not (home / "run").is_dir():
        return []
    return [process for server in servers(home) for process in server.processes()]


def is_initdb_at_work(home: Path) -> bool:
    """Return whether an initdb, or its orphan, makes data in this home."""
    programs = psutil.process_iter(["name", "cmdline"])
    return any(
        process.info["name"] in ("initdb", "postgres")
        and f"{home}/postgres/new-" in " ".join(process.info["cmdline"] or [])
        for process in programs
    )


def server_pids(home: Path) -> list[int]:
    """Return the pids of PostgreSQL and of Redis, if they run."""
    mains = [first_of(server.processes()) for server in servers(home)]
    return [process.pid for process in mains if process]


def eventually(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    assert wait_until(lambda: bool(condition()), seconds), "it did not happen in time"


@contextmanager
def python(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a process of its own. Kill it at the end if it still runs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRUEUP_")}
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def stack_user(home: Path, services: str = "postgres,redis") -> Iterator[subprocess.Popen[str]]:
    """Run a process that uses the stack of `home`. It is given ready."""
    with python(USER, home, services) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def finish(process: subprocess.Popen[str], how: signal.Signals | None = None) -> str:
    """End a process by a signal or by closing its input, and return the rest of its output.

    SIGINT goes to the whole process group, as Ctrl-C in a terminal does.
    """
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    elif how:
        process.send_signal(how)
    return process.communicate(timeout=DEADLINE_SECONDS)[0]


def alive(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
