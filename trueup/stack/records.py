"""Records of the stack's processes, so that the next start finds those a `kill -9` has left over.

Each process leads a process group of its own whose number is its pid. The record is on disk before
the process runs anything of ours (see `children.start_child`).
"""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from trueup.stack.processes import is_alive
from trueup.stack.waiting import wait_until

# A clock corrected since then shifts what the system reports as a process's creation time. Pids are
# not reused within seconds, so that a tolerance keeps the comparison safe.
_CLOCK_TOLERANCE_SECONDS = 2.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildRecord:
    """One process that was started; `create_time` is in seconds since the epoch."""

    name: str
    pid: int
    create_time: float


class ChildRecords:
    """`run/children.json`. Used under the up lock only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[ChildRecord]:
        """Return the records; none when the file is missing or not ours."""
        with suppress(OSError, ValueError, TypeError):
            return [ChildRecord(**entry) for entry in json.loads(self._path.read_text())]
        return []

    def add(self, record: ChildRecord) -> None:
        """Add a process."""
        self._write([*self.read(), record])

    def remove(self, pid: int) -> None:
        """Forget a process that has gone."""
        self._write([record for record in self.read() if record.pid != pid])

    def clear(self) -> None:
        """Forget all."""
        self._path.unlink(missing_ok=True)

    def _write(self, records: list[ChildRecord]) -> None:
        # By rename, so that a kill in between leaves the old list and never half a one.
        descriptor, name = tempfile.mkstemp(prefix="children-", dir=self._path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump([asdict(record) for record in records], file)
        os.replace(name, self._path)


def reap_leftovers(records: ChildRecords, home: Path, grace_seconds: float, say: Callable[[str], None]) -> None:
    """End the processes that a killed `trueup up` has left, groups included.

    SIGTERM first, SIGKILL after `grace_seconds`; `say` is told of each.
    """
    found = []
    for record in records.read():
        group = _leftovers(record, home)
        found += group
        if group:
            say(f"ending {record.name} (process {record.pid}), left by a killed `trueup up`")
            # To the leader only: a worker ends its own pool. Without a leader, to all.
            leader = [process for process in group if process.pid == record.pid]
            _send(leader or group, signal.SIGTERM)
    wait_until(lambda: not any(is_alive(process) for process in found), grace_seconds)
    _send(found, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(process) for process in found), _KILL_SECONDS)
    records.clear()


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # psutil leaves alone a process that reused the pid
            process.send_signal(number)


def _leftovers(record: ChildRecord, home: Path) -> list[psutil.Process]:
    """Return the living processes of the record's group that are certainly ours."""
    group = _group(record.pid)
    leader = next((process for process in group if process.pid == record.pid), None)
    if leader:
        age_differs = abs(leader.create_time() - record.create_time) > _CLOCK_TOLERANCE_SECONDS
        return [] if age_differs else group
    # Its leader has died: the number may have been reused by a group that has lost its leader too.
    return [process for process in group if _works_for(process, home)]


def _group(group_id: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(process.pid) == group_id and is_alive(process):
                found.append(process)
    return found


def _works_for(process: psutil.Process, home: Path) -> bool:
    with suppress(psutil.Error):
        return process.environ().get("TRUEUP_HOME") == str(home)
    return False
