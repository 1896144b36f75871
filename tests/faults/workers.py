"""The round's Celery workers: started, killed and stopped by their recorded pids, and started again when dead."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
TASK_MODULE = "tests.faults.spending"
_CLOCK = Path(__file__).with_name("clock")


@dataclass(kw_only=True)
class Worker:
    """One worker with all its restarts. `killed`: by pid, the time at which the harness ended each of its processes."""

    name: str
    log: Path
    environment: Mapping[str, str]
    concurrency: int
    skew_seconds: float = 0.0
    crashes: list[str] = field(default_factory=list)
    killed: dict[int, float] = field(default_factory=dict)
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _known: set[int] = field(default_factory=set)
    _log_start: int = 0
    _is_ready: bool = False

    def start(self) -> None:
        command = [
            *(
                str(Path(sys.executable).with_name("celery")),
                "-A",
                "trueup.worker",
                "worker",
                "-Q",
                "trueup-ai",
                "-I",
                TASK_MODULE,
            ),
            *("-c", str(self.concurrency), "-n", f"{self.name}@%h", "--without-mingle", "--without-gossip"),
        ]
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            # In its own session: Ctrl-C reaches the harness, which then ends the worker.
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=self._own_environment(),
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self._known = {self._process.pid}
        self._is_ready = False
        self.starts += 1

    def _own_environment(self) -> dict[str, str]:
        environment = dict(self.environment)
        if self.skew_seconds:
            environment["PYTHONPATH"] = os.pathsep.join([str(_CLOCK), environment["PYTHONPATH"]])
            environment["FAULTS_CLOCK_SKEW_SECONDS"] = str(self.skew_seconds)
        return environment

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def at_work(self) -> bool:
        """Whether it takes tasks now."""
        self._is_ready = self.alive and (self._is_ready or self._says_ready())
        return self._is_ready

    @property
    def crashed(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and not self.alive and self._process.pid not in self.killed

    def _says_ready(self) -> bool:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return b" ready." in log.read()

    def children(self) -> list[psutil.Process]:
        """Return the living processes of its pool, in order of pid."""
        if self._process is None or not self.alive:
            return []
        with suppress(psutil.NoSuchProcess):
            found = [child for child in psutil.Process(self._process.pid).children() if _runs(child)]
            self._known.update(child.pid for child in found)
            return sorted(found, key=lambda child: child.pid)
        return []

    def kill_child(self, child: psutil.Process) -> None:
        self.killed[child.pid] = time.monotonic()
        child.kill()

    def kill(self) -> None:
        """Kill the worker and its pool with SIGKILL at once, like a power failure of the machine."""
        if self._process is None:
            return
        if self.alive:
            self.children()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._bury()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker and its pool."""
        if self._process is not None and self.alive:
            os.killpg(self._process.pid, number)

    def revive(self) -> bool:
        """Start it again if it has died, and return whether it had. A death that the harness did not cause is noted."""
        if self._process is None or self.alive:
            return False
        if self.crashed:
            self.crashes.append(f"{self.name} ended with {self._process.returncode}: {self._last_words()}")
            self.kill()  # the rest of its pool, if any
        self.start()
        return True

    def _bury(self) -> None:
        now = time.monotonic()
        for pid in self._known:
            self.killed.setdefault(pid, now)

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace").strip().rpartition("\n")[2][:300]


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False
