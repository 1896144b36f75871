"""Server processes: start, find and stop them.

We recognise our processes by their working directory, the server's data folder. A pid file would not do: it survives
`kill -9` and reboots, and its pid may belong to another process by then.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from trueup.stack.waiting import wait_until

# All that a server gets of an environment, so that keys don't show in /proc/<pid>/environ of another user's process,
# and variables such as PGPORT or LD_PRELOAD don't change the server.
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The user that runs a server when trueup itself is root."""

    name: str
    uid: int
    gid: int


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block ends, so that it is never interrupted half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    caught: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    # Handlers and not a blocked mask: a server would inherit the mask, and could then not be stopped.
    previous = {kind: signal.signal(kind, remember) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
    for number in dict.fromkeys(caught):
        signal.raise_signal(number)


def run_tool(argv: Sequence[str], account: Account | None) -> subprocess.CompletedProcess[str]:
    """Run a short command as `account` (None: this user). A failure is in the result, not an exception."""
    return subprocess.run(  # noqa: S603 - our own argument list, no shell
        argv,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        cwd="/",
        **_isolated(account, {}),
    )


def start_detached(
    argv: Sequence[str], *, folder: Path, log: Path, account: Account | None, environment: Mapping[str, str]
) -> psutil.Process | None:
    """Start a server that outlives this process and works in `folder`. None: it has already ended.

    `environment` is added to its minimal one. A shell starts it, so that init becomes its parent and it never is a
    zombie of ours. Its own session protects it from the terminal's Ctrl-C while workers still finish.
    """
    with deferred_signals(), log.open("ab") as output:
        started = subprocess.run(  # noqa: S603 - our own argument list; "$@" is never parsed by the shell
            ["/bin/sh", "-c", 'umask 077; "$@" >&2 & echo $!', "sh", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            check=True,
            cwd=folder,
            **_isolated(account, environment),
        )
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int(started.stdout))
    return None


def _isolated(account: Account | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return options for `subprocess.run`: a session of its own (no Ctrl-C), a user and a minimal environment."""
    user = {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}
    return {"start_new_session": True, "env": _ENVIRONMENT | dict(environment), **user}


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process still runs. A zombie does not, nor a process that reuses the pid."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_in(folder: Path, names: tuple[str, ...]) -> list[psutil.Process]:
    """Return the living processes that work in `folder` and whose name starts with one of `names`."""
    wanted = os.path.realpath(folder)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cwd() == wanted and process.name().startswith(names) and is_alive(process):
                found.append(process)
    return found


def first_of(processes: Sequence[psutil.Process]) -> psutil.Process | None:
    """Return the main process of a server: its parent is not among `processes`."""
    pids = {process.pid for process in processes}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in pids:
                return process
    return None


def stop_processes(processes: Sequence[psutil.Process], steps: Sequence[tuple[signal.Signals, float]]) -> bool:
    """Send each signal in turn until all processes have ended. Return False if some still run.

    `steps` are signals, each with the seconds to wait after it. SIGKILL goes to every process, another signal to the
    main process.
    """
    for number, seconds in steps:
        living = [process for process in processes if is_alive(process)]
        for process in living if number is signal.SIGKILL else filter(None, [first_of(living)]):
            # psutil compares the creation time first, so it never signals a process that reuses the pid.
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if wait_until(lambda: not any(is_alive(process) for process in processes), seconds):
            return True
    return False
