"""Child processes of the stack, and the records by which the next start finds the children that a `kill -9` left.

Each child leads a process group of its own, whose number is its pid. Its record is on disk before its program runs.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from trueup.stack.commands import Command
from trueup.stack.layout import replace_json
from trueup.stack.processes import is_alive
from trueup.stack.waiting import wait_until

# The shell waits for one line before it executes the program. We write the line after the record. If we are killed
# before that, the pipe closes and the shell ends, so no program ever runs without a record.
_GATE = 'read -r go && exec "$@" </dev/null'

# A correction of the clock changes the creation time that the system reports for a process. The system does not reuse
# a pid within seconds, so the comparison is safe with a tolerance.
_CLOCK_TOLERANCE_SECONDS = 2.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildRecord:
    """One started process. `create_time` is in seconds since the epoch."""

    name: str
    pid: int
    create_time: float


class ChildRecords:
    """A file of records, `run/children.json` for `trueup up`. Its user holds a lock, so that there is one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[ChildRecord]:
        """Return the records, or [] if the file is missing or invalid."""
        with suppress(OSError, ValueError, TypeError):
            return [ChildRecord(**entry) for entry in json.loads(self._path.read_text())]
        return []

    def add(self, record: ChildRecord) -> None:
        """Add the record of a process."""
        self._write([*self.read(), record])

    def remove(self, pid: int) -> None:
        """Remove the record of a process that has ended."""
        self._write([record for record in self.read() if record.pid != pid])

    def clear(self) -> None:
        """Remove all records."""
        self._path.unlink(missing_ok=True)

    def _write(self, records: list[ChildRecord]) -> None:
        replace_json(self._path, [asdict(record) for record in records])


class Child:
    """A started process with piped output. Its pid is also the number of its process group."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101 - for the type checker: the output is a pipe
        self.output = process.stdout
        self.output_ended = False  # it may close its output and still run
        self.pid = process.pid
        self._process = process
        self._watched = psutil.Process(process.pid)
        self._unfinished_line = b""
        os.set_blocking(self.output.fileno(), False)

    def has_ended(self) -> bool:
        """Return whether it has ended. `reap` can still read its exit code afterwards."""
        return not is_alive(self._watched)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process, not its group: a worker ends its own pool."""
        # Only `reap` reaps it, so its pid can't belong to another process before that.
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill every process of its group."""
        # Before `reap` reaps the leader: until then its number can't belong to another group.
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM if only a zombie is left
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kill its whole group, and return its exit code. -N means that signal N ended it."""
        self.kill_group()
        return self._process.wait()

    def lines(self) -> list[str]:
        """Return the lines that it has completed since the last call. Never blocks."""
        *complete, self._unfinished_line = (self._unfinished_line + self._read()).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in complete]

    def close(self) -> list[str]:
        """Return its last lines, with an unfinished one, and close the pipe."""
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
            self.output_ended = True
        return b"".join(chunks)


def start_child(
    command: Command, environment: Mapping[str, str], records: ChildRecords, output: int | IO[bytes] = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start the command after it is on record. `output` takes its standard output and errors.

    Raises `OSError` when not even a shell can start.
    """
    # A script of our own Python environment has priority over PATH.
    script = Path(sys.executable).parent / command.tokens[0]
    program = str(script) if script.is_file() else command.tokens[0]
    process = subprocess.Popen(  # noqa: S603 - our own table; "$@" is never parsed by the shell
        ["/bin/sh", "-c", _GATE, "sh", program, *command.tokens[1:]],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches only us, and we stop the children
    )
    try:
        created = psutil.Process(process.pid).create_time()
        records.add(ChildRecord(name=command.name, pid=process.pid, create_time=created))
        if process.stdin:
            # A broken pipe means that the shell is dead. The caller sees that anyway.
            with suppress(BrokenPipeError):
                process.stdin.write(b"\n")
            with suppress(BrokenPipeError):
                process.stdin.close()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


def reap_leftovers(records: ChildRecords, home: Path, grace_seconds: float, say: Callable[[str], None]) -> None:
    """End the recorded processes that a killed `trueup up` left, and their groups.

    Send SIGTERM, and SIGKILL after `grace_seconds`. `say` gets a message for each record.
    """
    found = []
    for record in records.read():
        group = _leftovers(record, home)
        found += group
        if group:
            say(f"ending {record.name} (process {record.pid}), left by a killed `trueup up`")
            # To the leader only, because a worker ends its own pool. Without a leader, to all.
            leader = [process for process in group if process.pid == record.pid]
            _send(leader or group, signal.SIGTERM)
    wait_until(lambda: not any(is_alive(process) for process in found), grace_seconds)
    _send(found, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(process) for process in found), _KILL_SECONDS)
    records.clear()


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # psutil never signals a process that reuses the pid
            process.send_signal(number)


def _leftovers(record: ChildRecord, home: Path) -> list[psutil.Process]:
    """Return the living processes of the record's group that are certainly ours."""
    group = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(process.pid) == record.pid and is_alive(process):
                group.append(process)
    leader = next((process for process in group if process.pid == record.pid), None)
    if leader:
        other = abs(leader.create_time() - record.create_time) > _CLOCK_TOLERANCE_SECONDS
        return [] if other else group
    # The leader is dead. Another group that has also lost its leader may have reused the number.
    return [process for process in group if _works_for(process, home)]


def _works_for(process: psutil.Process, home: Path) -> bool:
    with suppress(psutil.Error):
        return process.environ().get("TRUEUP_HOME") == str(home)
    return False
