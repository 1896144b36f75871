"""A worker for as long as one command waits for its task."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from billing.settings import Settings
from worker.stack.commands import stack_commands
from worker.stack.layout import prepare_layout
from worker.stack.locks import FileLock
from worker.stack.records import ChildRecord, ChildRecords, reap_leftovers

GRACE_SECONDS = 45.0


@contextmanager
def temporary_worker(settings: Settings) -> Iterator[None]:
    """Run the stack's AI worker inside the block, logging to `log/temporary-worker.log`.

    One at a time per home: a second command gets along with the first one's, and waits in the queue if that one ends
    too early. What a killed command has left is ended first.
    """
    layout = prepare_layout(settings)
    lock = FileLock(layout.run / "temporary-worker.lock")
    if not lock.try_exclusive():
        yield
        return
    try:
        records = ChildRecords(layout.run / "temporary-worker.json")
        reap_leftovers(records, layout.home, GRACE_SECONDS, lambda _message: None)
        with layout.log_file("temporary-worker").open("ab") as log:
            process = _start(settings, log.fileno())
        records.add(ChildRecord(name="worker", pid=process.pid, create_time=psutil.Process(process.pid).create_time()))
        try:
            yield
        finally:
            _stop(process)
            records.clear()
    finally:
        lock.release()


def _start(settings: Settings, log: int) -> subprocess.Popen[bytes]:
    tokens = stack_commands(settings.home)[0].tokens
    program = Path(sys.executable).parent / tokens[0]
    return subprocess.Popen(  # noqa: S603 - our own table
        [str(program), *tokens[1:]],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=dict(os.environ) | {"TRUEUP_HOME": str(settings.home)},
        start_new_session=True,  # Ctrl-C reaches us alone; we then let the worker finish
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
