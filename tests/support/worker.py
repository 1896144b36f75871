"""A real Celery worker in a subprocess."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from celery import Celery

from tests.support.waiting import DEADLINE_SECONDS, wait_for


def own_application() -> Celery:
    """Return trueup's application with its tasks, as its worker has it. `shared_task`s register with it."""
    from trueup.worker.celery import app

    app.set_current()
    app.loader.import_default_modules()
    return app


class WorkerProcess:
    """A worker, its log, and the pids of its pool."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pool(self) -> list[psutil.Process]:
        """Return the pool's processes."""
        return psutil.Process(self.process.pid).children()

    def stop(self) -> None:
        """Stop it warm. If it does not end, kill it and its pool."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the worker and its pool with SIGKILL, like a power failure of the machine."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_SECONDS)


def close_connections(app: Celery) -> None:
    """Close all of an application's connections to Redis. It connects again when it needs them.

    Python warns when it collects an open socket, in an arbitrary later test.
    """
    gc.collect()  # collecting a result unsubscribes it, which needs a connection
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()
    for pool in (app.producer_pool, app.pool):
        pool.force_close_all(close_pool=False)
        pool.setup()  # otherwise the pool stays empty, and its users wait for ever


@contextmanager
def running_worker(
    log: Path,
    *,
    queues: Sequence[str] = ("trueup-ai",),
    include: Sequence[str] = (),
    concurrency: int = 2,
    more: Sequence[str] = (),
) -> Iterator[WorkerProcess]:
    """Run a worker on this process's settings until the block ends. It is given ready. `more`: its last arguments."""
    celery = Path(sys.executable).with_name("celery")
    command = [str(celery), "-A", "trueup.worker", "worker", "-Q", ",".join(queues), "-c", str(concurrency)]
    # These ask the other workers of the broker for a second, and there are none.
    command += ["--without-mingle", "--without-gossip"]
    if include:
        command += ["-I", ",".join(include)]
    with running_command([*command, *more], log) as worker:
        yield worker


@contextmanager
def running_command(
    command: Sequence[str | Path],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[WorkerProcess]:
    """Run a worker command until the block ends. It is ready when given.

    `folder`, `environment`: None means this process's.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    worker = WorkerProcess(process, log)
    try:
        wait_for(
            lambda: " ready." in worker.output or process.poll() is not None,
            "the worker is ready",
        )
        assert process.poll() is None, worker.output
        yield worker
    finally:
        worker.stop()
