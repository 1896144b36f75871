"""Server processes: started in a session of their own, found again by the folder they work in.

A process of ours is recognised by its working directory, which is the server's data folder, and
never by a pid file: those outlive `kill -9` and reboots, and their number may belong to someone
else by then.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from trueup.stack.waiting import wait_until

_SERVER_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The user a server runs as when trueup itself is root."""

    name: str
    uid: int
    gid: int


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the block is done, so that nothing is half started."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are delivered to the main thread only
        return
    caught: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    # Handlers, not a blocked mask: a mask would be inherited by the server, which could then not be
    # stopped.
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = {kind: signal.signal(kind, remember) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
    for number in dict.fromkeys(caught):
        signal.raise_signal(number)


def run_tool(argv: Sequence[str], account: Account | None) -> subprocess.CompletedProcess[str]:
    """Run a short command as `account` (None: as ourselves); its failure is in the result."""
    return subprocess.run(  # noqa: S603 - our own argument list, no shell
        argv,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        cwd="/",
        env=_server_environment(),
        start_new_session=True,  # Ctrl-C in the terminal must not tear it
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


def start_detached(argv: Sequence[str], *, folder: Path, log: Path, account: Account | None) -> psutil.Process | None:
    """Start a server that outlives us and works in `folder`; None when it was gone at once.

    The shell in between makes init its parent, so that it never is a zombie of ours, and its new
    session keeps the terminal's Ctrl-C away from it while workers still finish.
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
            env=_server_environment(),
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int(started.stdout))
    return None


def is_alive(process: psutil.Process) -> bool:
    """Return whether this very process still runs; not if it is a zombie or its pid was reused."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_in(folder: Path, names: tuple[str, ...]) -> list[psutil.Process]:
    """Return the living processes that work in `folder` and have a name that starts with `names`."""
    wanted = os.path.realpath(folder)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cwd() == wanted and process.name().startswith(names) and is_alive(process):
                found.append(process)
    return found


def first_of(processes: Sequence[psutil.Process]) -> psutil.Process | None:
    """Return the server itself among its processes: the one whose parent is none of them."""
    pids = {process.pid for process in processes}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in pids:
                return process
    return None


def stop_processes(processes: Sequence[psutil.Process], steps: Sequence[tuple[signal.Signals, float]]) -> bool:
    """Send the server each signal in turn until all processes have gone; False when some stay.

    Each step waits at most its seconds. The signal goes to the server, SIGKILL to every process.
    """
    for number, seconds in steps:
        living = [process for process in processes if is_alive(process)]
        server = first_of(living)
        for process in living if number is signal.SIGKILL else filter(None, [server]):
            # psutil compares the creation time before it signals: a reused pid is left alone.
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if wait_until(lambda: not any(is_alive(process) for process in processes), seconds):
            return True
    return False


def _server_environment() -> dict[str, str]:
    # Nothing of ours: keys must not show in /proc/<pid>/environ of another user's process, and
    # variables such as PGPORT or LD_PRELOAD must not change what is started.
    return {"PATH": _SERVER_PATH, "LC_ALL": "C"}
