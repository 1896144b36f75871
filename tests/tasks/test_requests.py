"""What a worker's main process does for a task whose time is up."""

import os
import subprocess
import sys
from typing import Any

import pytest
from celery.worker.request import Request

from trueup.tasks import requests
from trueup.tasks.requests import MeteredRequest


class TimedOut(MeteredRequest):
    """A request without its message: what comes of it is told by `told`."""

    def __init__(self, pid: int | None) -> None:
        self.worker_pid = pid
        self.told: list[Any] = []
        self.process: subprocess.Popen[bytes] | None = None

    def _tell(self, note: Any) -> None:
        self.told.append((note, None if self.process is None else self.process.wait(timeout=5)))


@pytest.fixture(autouse=True)
def _no_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "on_timeout", lambda *_: None)


def test_a_process_whose_time_is_up_is_dead_before_its_tokens_are_given_back() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        request = TimedOut(process.pid)
        request.process = process
        request.on_timeout(True, 1)
        assert (request.told, process.poll()) == ([], None)
        request.on_timeout(False, 1)
        assert request.told == [(requests.close_abandoned_hold, -9)]


def test_a_pool_without_processes_is_not_killed() -> None:
    request = TimedOut(os.getpid())
    request.on_timeout(False, 1)
    assert request.told == [(requests.close_abandoned_hold, None)]


def test_a_worker_that_was_started_again_owns_nothing_of_its_predecessors() -> None:
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
