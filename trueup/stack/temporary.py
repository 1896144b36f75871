"""A temporary worker: it runs while one command waits for its task."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trueup.settings.settings import Settings
from trueup.stack.children import ChildRecords, reap_leftovers, start_child
from trueup.stack.commands import Command, embedded_settings, stack_commands
from trueup.stack.errors import StackError
from trueup.stack.layout import log_tail, prepare_layout, rotate_log
from trueup.stack.locks import FileLock
from trueup.stack.processes import deferred_signals

GRACE_SECONDS = 45.0
NAME = "temporary-worker"


@contextmanager
def temporary_worker(settings: Settings) -> Iterator[Callable[[], None]]:
    """Run the stack's AI worker inside the block. It logs to `log/temporary-worker.log`.

    A home has at most one: a second command uses the first one's. The block gets a function to call now and then. It
    starts a worker when the first command's has ended, and raises `StackError` when our own has died.
    """
    worker = TemporaryWorker(settings)
    try:
        worker.tend()
        yield worker.tend
    finally:
        worker.stop()


class TemporaryWorker:
    """The temporary worker of a home, if this process started it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = embedded_settings(settings)
        self._layout = prepare_layout(settings)
        self._log = self._layout.log_file(NAME)
        self._lock = FileLock(self._layout.run / f"{NAME}.lock")
        self._records = ChildRecords(self._layout.run / f"{NAME}.json")
        self._process: subprocess.Popen[bytes] | None = None

    def tend(self) -> None:
        """Start the worker if no command of this home runs one. Raises `StackError` when ours has died."""
        if self._process is None:
            if self._lock.try_exclusive():
                self._end_leftovers(GRACE_SECONDS)
                rotate_log(self._log)
                self._start()
        elif (code := self._process.poll()) is not None:
            raise StackError(
                "The temporary worker",
                str(self._layout.home),
                f"it ended with code {code}. The end of its log:\n{log_tail(self._log)}\n",
                f"Correct the cause (the whole log is {self._log}). The task stays enqueued.",
            )

    def stop(self) -> None:
        """Let the worker finish its tasks, then end it. An interrupt while it finishes ends it at once."""
        try:
            if self._process is not None:
                _stop(self._process)
                # If it died by itself, its pool may still run.
                self._end_leftovers(0)
        finally:
            self._lock.release()

    def _end_leftovers(self, grace_seconds: float) -> None:
        reap_leftovers(self._records, self._layout.home, grace_seconds, lambda _message: None)

    def _start(self) -> None:
        command = stack_commands(self._layout.home)[0]
        # Its own node name distinguishes it from the worker of a `trueup up` that starts meanwhile. Without mingle it
        # is ready a second sooner; other workers have no state that it needs.
        options = ("-n", "temporary@%h", "--without-mingle", "--without-gossip")
        environment = dict(os.environ) | {"TRUEUP_HOME": str(self._layout.home)} | self._settings
        # An interrupt waits until the process is assigned, so that `stop` always ends it.
        with self._log.open("ab") as log, deferred_signals():
            command = Command(name=command.name, tokens=(*command.tokens, *options))
            self._process = start_child(command, environment, self._records, log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
