"""What an embedded server can do, and how one is brought to answer."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import psutil

from trueup.stack.errors import StackError, explained
from trueup.stack.layout import log_tail, rotate_log
from trueup.stack.processes import is_alive, stop_processes
from trueup.stack.waiting import wait_until

# A server that was killed replays its log before it answers: give it time.
START_SECONDS = 60.0


class Server(Protocol):
    """One embedded server of one home. Every method is called under the service's mutex."""

    @property
    def service(self) -> str:
        """Its name in messages, file names and `running_stack(services=...)`."""
        ...

    @property
    def data(self) -> Path:
        """The folder with its data, in which its processes work."""
        ...

    @property
    def log(self) -> Path:
        """The file it writes its log to."""
        ...

    @property
    def stop_steps(self) -> Sequence[tuple[signal.Signals, float]]:
        """The signals that stop it, gentlest first, each with the seconds it may take."""
        ...

    def url(self) -> str:
        """Return the URL that SQLAlchemy or Celery takes."""
        ...

    def answers(self) -> bool:
        """Return whether it serves requests now."""
        ...

    def processes(self) -> list[psutil.Process]:
        """Return all its living processes."""
        ...

    def launch(self) -> psutil.Process | None:
        """Start it without waiting; None when it was gone at once."""
        ...


def ensure_running(server: Server) -> None:
    """Adopt the server if it runs, else start it. Raises `StackError` when it does not come up."""
    if server.answers() or _adopt(server):
        return
    with explained(server.service, server.data):
        rotate_log(server.log)
        process = server.launch()
    wait_until(lambda: server.answers() or not (process and is_alive(process)), START_SECONDS)
    if not server.answers():
        stop_server(server)
        raise StackError(
            server.service,
            str(server.data),
            f"the server did not start. Its last words were:\n{log_tail(server.log)}\n",
            _remedy(server),
        )


def stop_server(server: Server) -> None:
    """Stop the server and wait until its processes have gone; without effect when none runs.

    Raises `StackError` when it survives even SIGKILL.
    """
    left = server.processes()
    if left and not stop_processes(left, server.stop_steps):
        pids = ", ".join(str(process.pid) for process in left if is_alive(process))
        raise StackError(
            server.service,
            str(server.data),
            f"the server does not stop (process {pids})",
            "It is probably waiting for a disk that does not answer; check the disk.",
        )


def _adopt(server: Server) -> bool:
    """Wait for a server left by a killed process: it may be starting, recovering or stopping.

    False when it has gone, so that a new one may use the data. Two servers must never share a
    data folder.
    """
    if not server.processes():
        return False
    wait_until(lambda: server.answers() or not server.processes(), START_SECONDS)
    if server.answers():
        return True
    left = server.processes()
    if not left:
        return False
    raise StackError(
        server.service,
        str(server.data),
        f"process {left[0].pid} serves it but has not answered for {START_SECONDS:.0f} s",
        f"Try again; if it stays silent, `kill {left[0].pid}`. Its log is {server.log}.",
    )


def _remedy(server: Server) -> str:
    if "No space left on device" in log_tail(server.log):
        return "Free some disk space, then try again."
    return (
        f"Correct the cause (the whole log is {server.log}), or set "
        "TRUEUP_DATABASE_URL and TRUEUP_BROKER_URL to servers of your own."
    )
