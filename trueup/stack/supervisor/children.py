"""One supervised process: started behind a gate, in a process group of its own, its output piped."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from trueup.stack.processes import is_alive
from trueup.stack.records import ChildRecord, ChildRecords
from trueup.stack.supervisor.commands import Command

# The shell waits for one line before it becomes the program. Only then is the process on record;
# and if we are killed before, the pipe closes and the shell ends: no program ever runs unrecorded.
GATE = 'read -r go && exec "$@" </dev/null'


class Child:
    """A process that has been started; its pid is also the number of its process group."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101 - for the type checker: it was asked for
        self.command = command
        self.output = process.stdout
        self.is_silent = False  # set when it has closed its output, though it may go on running
        self._process = process
        self._watched = psutil.Process(process.pid)
        self._unfinished_line = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def create_time(self) -> float:
        """Seconds since the epoch."""
        return self._watched.create_time()

    def has_ended(self) -> bool:
        """Return whether it has ended, without taking the end away from `reap`."""
        return not is_alive(self._watched)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process itself, not its group: a worker ends its own pool."""
        # Never reaped before `reap`, not even when it has ended: so the pid is still its own.
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill all that is left of its group."""
        # Before the leader is reaped: until then its number can't belong to another group.
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when only a zombie is left
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kill what is left of its group, and return its exit code; -N means ended by signal N."""
        self.kill_group()
        return self._process.wait()

    def lines(self) -> list[str]:
        """Return the lines it has completed since the last call. Never blocks."""
        *complete, self._unfinished_line = (self._unfinished_line + self._read()).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in complete]

    def close(self) -> list[str]:
        """Return its last lines, an unfinished one included, and close the pipe."""
        lines = self.lines()
        if self._unfinished_line:
            lines.append(self._unfinished_line.decode(errors="replace"))
        self.output.close()
        return lines

    def _read(self) -> bytes:
        chunks = []
        with suppress(BlockingIOError):
            while chunk := os.read(self.output.fileno(), 65536):
                chunks.append(chunk)
            self.is_silent = True
        return b"".join(chunks)


def start_child(command: Command, environment: dict[str, str], records: ChildRecords) -> Child:
    """Start the command, on record before it runs. Raises `OSError` when even a shell can't start."""
    process = subprocess.Popen(  # noqa: S603 - our own table; "$@" is never parsed by the shell
        ["/bin/sh", "-c", GATE, "sh", program_path(command), *command.tokens[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches us alone; we tell the children when to stop
    )
    try:
        child = Child(command, process)
        os.set_blocking(child.output.fileno(), False)
        records.add(ChildRecord(name=command.name, pid=child.pid, create_time=child.create_time))
        open_gate(process)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return child


def open_gate(process: subprocess.Popen[bytes]) -> None:
    """Let the shell become its program."""
    # A broken pipe means that the shell is dead already: the supervisor sees that by itself.
    if process.stdin:
        with suppress(BrokenPipeError):
            process.stdin.write(b"\n")
        with suppress(BrokenPipeError):
            process.stdin.close()


def program_path(command: Command) -> str:
    """Return the path of the first token: a script of our own Python environment goes before PATH."""
    script = Path(sys.executable).parent / command.tokens[0]
    return str(script) if script.is_file() else command.tokens[0]
