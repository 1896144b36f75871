"""A worker for as long as one command waits for its task."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from trueup.settings.settings import Settings
from trueup.stack.errors import StackError
from trueup.stack.layout import log_tail, prepare_layout, rotate_log
from trueup.stack.locks import FileLock
from trueup.stack.records import ChildRecord, ChildRecords, reap_leftovers
from trueup.stack.supervisor.children import GATE, open_gate, program_path
from trueup.stack.supervisor.commands import embedded_settings, stack_commands

GRACE_SECONDS = 45.0
NAME = "temporary-worker"


@contextmanager
def temporary_worker(settings: Settings) -> Iterator[Callable[[], None]]:
    """Run the stack's AI worker inside the block, logging to `log/temporary-worker.log`.

    One at a time per home: a second command gets along with the first one's. Gives a function to call now and then: it
    starts a worker when the first one's has ended, and raises `StackError` when our own has died. What a killed command
    has left is ended first.
    """
    worker = TemporaryWorker(settings)
    try:
        worker.tend()
        yield worker.tend
    finally:
        worker.stop()


class TemporaryWorker:
    """The one temporary worker of a home, if it is ours."""

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
                reap_leftovers(self._records, self._layout.home, GRACE_SECONDS, lambda _message: None)
                rotate_log(self._log)
                self._start()
        elif (code := self._process.poll()) is not None:
            raise StackError(
                "The temporary worker",
                str(self._layout.home),
                f"it ended with code {code}. Its last words were:\n{log_tail(self._log)}\n",
                f"Correct the cause (the whole log is {self._log}); the task stays enqueued.",
            )

    def stop(self) -> None:
        """Let it finish what it has begun, then end it; an interrupt while it does ends it at once."""
        try:
            if self._process is not None:
                _stop(self._process)
                # What is left when it died by itself, its pool for one.
                reap_leftovers(self._records, self._layout.home, 0, lambda _message: None)
        finally:
            self._lock.release()

    def _start(self) -> None:
        command = stack_commands(self._layout.home)[0]
        # A node name of its own, so that it is never taken for the worker of a `trueup up` that starts meanwhile.
        # Without mingle it is ready a second sooner; it has nothing to learn from others.
        options = ("-n", "temporary@%h", "--without-mingle", "--without-gossip")
        tokens = (program_path(command), *command.tokens[1:], *options)
        with self._log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own table; "$@" is never parsed by the shell
                ["/bin/sh", "-c", GATE, "sh", *tokens],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(os.environ) | {"TRUEUP_HOME": str(self._layout.home)} | self._settings,
                start_new_session=True,  # Ctrl-C reaches us alone; we then let the worker finish
            )
        self._process = process  # from here on `stop` ends it, whatever happens
        created = psutil.Process(process.pid).create_time()
        self._records.add(ChildRecord(name=command.name, pid=process.pid, create_time=created))
        open_gate(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except BaseException as error:
        _kill(process)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
