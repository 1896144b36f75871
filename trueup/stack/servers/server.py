"""The base of the embedded servers: how to start and stop one."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import psutil

from trueup.stack.errors import StackError, explained
from trueup.stack.layout import log_tail, rotate_log
from trueup.stack.processes import is_alive, processes_in, stop_processes
from trueup.stack.waiting import wait_until

# A server that was killed replays its log before it answers, which takes time.
START_SECONDS = 60.0


class Server(ABC):
    """One embedded server of one home. Its caller holds the service's mutex during every method."""

    service: str
    """Its name in messages, file names and `running_stack(services=...)`."""
    process_names: tuple[str, ...]
    """The beginnings of its processes' names."""
    stop_steps: Sequence[tuple[signal.Signals, float]]
    """The signals that stop it, the gentlest first, each with the seconds to wait after it."""
    data: Path
    """The folder with its data, in which its processes work."""
    log: Path
    """Its log file."""

    @abstractmethod
    def url(self) -> str:
        """Return the URL for SQLAlchemy or Celery."""

    @abstractmethod
    def answers(self) -> bool:
        """Return whether it serves requests now."""

    @abstractmethod
    def launch(self) -> psutil.Process | None:
        """Start it without waiting. None: it has already ended."""

    def processes(self) -> list[psutil.Process]:
        """Return all its living processes, with the leftovers of a killed server."""
        return processes_in(self.data, self.process_names)

    def ensure_running(self) -> None:
        """Adopt the server if it runs, else start it. Raises `StackError` when it does not answer in time."""
        if self.answers() or self._adopt():
            return
        with explained(self.service, self.data):
            rotate_log(self.log)
            process = self.launch()
        wait_until(lambda: self.answers() or not (process and is_alive(process)), START_SECONDS)
        if not self.answers():
            self.stop()
            tail = log_tail(self.log)
            raise self._error(
                f"the server did not start. The end of its log:\n{tail}\n",
                "Free some disk space, then try again."
                if "No space left on device" in tail
                else f"Correct the cause (the whole log is {self.log}), or set TRUEUP_DATABASE_URL and "
                "TRUEUP_BROKER_URL to servers of your own.",
            )

    def stop(self) -> None:
        """Stop the server, if it runs, and wait until its processes have ended.

        Raises `StackError` when it survives even SIGKILL.
        """
        left = self.processes()
        if left and not stop_processes(left, self.stop_steps):
            pids = ", ".join(str(process.pid) for process in left if is_alive(process))
            raise self._error(
                f"the server does not stop (process {pids})",
                "It is probably waiting for a disk that does not answer. Check the disk.",
            )

    def _adopt(self) -> bool:
        """Wait for a server that a killed process left: it may be starting, recovering or stopping.

        False: it has ended, so a new server may use the data. Two servers must never share a data folder.
        """
        if not self.processes():
            return False
        wait_until(lambda: self.answers() or not self.processes(), START_SECONDS)
        if self.answers():
            return True
        if not (left := self.processes()):
            return False
        raise self._error(
            f"process {left[0].pid} serves it but has not answered for {START_SECONDS:.0f} s",
            f"Try again. If it still does not answer, run `kill {left[0].pid}`. Its log is {self.log}.",
        )

    def _error(self, cause: str, remedy: str) -> StackError:
        return StackError(self.service, str(self.data), cause, remedy)
