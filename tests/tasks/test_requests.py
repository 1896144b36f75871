"""A worker's main process closes the hold of a task that it killed."""

import os
import subprocess
import sys
from typing import Any

import pytest
from celery.worker.request import Request

from trueup.tasks import requests
from trueup.tasks.requests import MeteredRequest


class TimedOut(MeteredRequest):
    """A request without a message. It collects the recorded writes, and the exit status its process had by then."""

    def __init__(self, pid: int | None) -> None:
        self.worker_pid = pid
        self.recorded: list[Any] = []
        self.process: subprocess.Popen[bytes] | None = None

    def _record(self, write: Any) -> None:
        self.recorded.append((write, None if self.process is None else self.process.wait(timeout=5)))


@pytest.fixture(autouse=True)
def _no_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "on_timeout", lambda *_: None)


def test_a_process_past_its_hard_time_limit_is_dead_before_its_hold_is_closed() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        request = TimedOut(process.pid)
        request.process = process
        request.on_timeout(True, 1)
        assert (request.recorded, process.poll()) == ([], None)
        request.on_timeout(False, 1)
        assert request.recorded == [(requests.close_abandoned_hold, -9)]


def test_a_worker_without_pool_processes_does_not_kill_itself() -> None:
    request = TimedOut(os.getpid())
    request.on_timeout(False, 1)
    assert request.recorded == [(requests.close_abandoned_hold, None)]


def test_a_restarted_worker_does_not_own_holds_of_its_earlier_run() -> None:
    program = (
        "import os\n"
        "from trueup.tasks.requests import owner_name\n"
        "print(owner_name('celery@box', 7), flush=True)\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "else:\n"
        "    print(owner_name('celery@box', 7), flush=True)\n"
    )
    lives = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert [len(set(names)) for names in lives] == [1, 1]
    assert lives[0] != lives[1]
