"""The gate's cost for a Celery task: guarded and bare no-ops on one worker, and the memory of a long run.

python -m benchmarks.guarded_task [--tasks 2000] [--memory-tasks 50000]
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from celery import Celery
from sqlalchemy import create_engine, text

from benchmarks.common import ROUNDS, own_stack, print_markdown
from trueup.install.install import install
from trueup.settings.settings import get_settings

TASKS = "benchmarks.noop_tasks"
USERS = 500
SAMPLES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2_000, help="tasks of each kind in a round")
    parser.add_argument("--memory-tasks", type=int, default=50_000, help="tasks of the long run; 0: none")
    options = parser.parse_args()
    with own_stack() as urls:
        prepare(str(urls.database_url))
        from trueup.worker.celery import app

        app.set_current()
        app.loader.import_task_module(TASKS)
        compare(app, options.tasks)
        if options.memory_tasks:
            watch_memory(app, options.memory_tasks)


def prepare(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        install(connection, get_settings().host, with_host_tables=True)
        connection.execute(
            text("INSERT INTO public.billing_tokenplan (id, name, tokens_included) VALUES (1, 'p', 2000000000)")
        )
        connection.execute(
            text("INSERT INTO public.accounts_user SELECT i, 'user' || i, 'e' FROM generate_series(1, :n) i"),
            {"n": USERS},
        )
        connection.execute(
            text(
                "INSERT INTO public.billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
                "SELECT i, i, 1, now() - interval '1 day', 2000000000 FROM generate_series(1, :n) i"
            ),
            {"n": USERS},
        )
    engine.dispose()


@contextmanager
def worker(*more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a prefork worker of two processes until the block ends."""
    celery = Path(sys.executable).with_name("celery")
    command = [str(celery), "-A", "trueup.worker", "worker", "-Q", "trueup-ai", "-c", "2", "-I", TASKS, *more]
    # Celery keeps a timer for each task until its time limit, even after the task's end. With a short limit, the final
    # memory is a worker's steady state.
    environment = os.environ | {"TRUEUP_LOG_LEVEL": "WARNING", "TRUEUP_TASK_TIME_LIMIT_SECONDS": "20"}
    process = subprocess.Popen(  # noqa: S603 - our own program
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def drain(app: Celery, name: str, count: int) -> float:
    """Enqueue that many tasks, then start a worker. Returns its tasks per second, without its boot."""
    task = app.tasks[name]
    for number in range(count):
        task.apply_async(kwargs={"user_id": number % USERS + 1}, ignore_result=True)
    with app.connection_for_read() as connection, connection.channel() as channel, worker():
        while (left := channel.client.llen("trueup-ai")) > count - 20:
            time.sleep(0.01)
        started, first = time.perf_counter(), left
        while (left := channel.client.llen("trueup-ai")) > 0:
            time.sleep(0.01)
        return first / (time.perf_counter() - started)


def compare(app: Celery, count: int) -> None:
    rates: dict[str, list[float]] = {"bench.bare": [], "bench.held": [], "bench.charged": []}
    for _ in range(ROUNDS):
        for name, taken in rates.items():
            taken.append(drain(app, name, count))
    middle = {name: statistics.median(taken) for name, taken in rates.items()}
    print_markdown(
        "A no-op Celery task, prefork 2",
        ("task", "tasks/s", "× bare"),
        [
            (label, f"{middle[name]:,.0f}", f"{middle[name] / middle['bench.bare']:.2f}")
            for label, name in (
                ("bare", "bench.bare"),
                ("held and released", "bench.held"),
                ("held, one call begun and charged, closed", "bench.charged"),
            )
        ],
    )


def watch_memory(app: Celery, count: int) -> None:
    """Return the resident memory of a worker's processes while they run that many charged tasks. None is replaced."""
    rows = []
    with (
        worker("--max-tasks-per-child", str(count * 2)) as process,
        app.connection_for_read() as connection,
        connection.channel() as channel,
    ):
        for sample in range(1, SAMPLES + 1):
            for number in range(count // SAMPLES):
                app.tasks["bench.charged"].apply_async(kwargs={"user_id": number % USERS + 1}, ignore_result=True)
            while channel.client.llen("trueup-ai") > 0:
                time.sleep(0.05)
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
            sizes = [one.memory_info().rss / 2**20 for one in family]
            rows.append((f"{sample * count // SAMPLES:,}", *(f"{size:.0f} MB" for size in sizes)))
    print_markdown("Memory of a worker", ("tasks done", "main", "child 1", "child 2"), rows)


if __name__ == "__main__":
    main()
