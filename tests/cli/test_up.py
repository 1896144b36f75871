"""A real `trueup up`: its processes, the commands that use it, and its end. It starts twice in all."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.conftest import TRUEUP, assert_nothing_runs
from tests.stack.helpers import server_pids, temporary_home
from tests.support.api import free_port
from tests.support.demo import environment_of, processes_of
from tests.support.waiting import wait_for
from trueup.cli.client import celery_client
from trueup.settings.settings import Settings
from trueup.stack.processes import is_alive

STOP_SECONDS = 60.0


class Up:
    """A home, and the `trueup up` that runs in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home.with_name("up.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.api = f"http://127.0.0.1:{self.port}"

    def start(self) -> int:
        """Start it, and return its pid once both workers answer."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [TRUEUP, "up"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(),
                start_new_session=True,
            )
        wait_for(lambda: self.process.poll() is not None or self.runs(), "the stack is up")  # type: ignore[union-attr]
        assert self.process.poll() is None, self.log.read_text()
        return self.process.pid

    def environment(self) -> dict[str, str]:
        return environment_of(self.home) | {"TRUEUP_API__DEMO": "true", "TRUEUP_API__PORT": str(self.port)}

    def runs(self) -> bool:
        return self.log.read_text().count(" ready.") >= 2

    def stop(self, number: signal.Signals) -> int:
        """Signal it and everything in its terminal, and return its exit code."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        return self.process.wait(STOP_SECONDS)

    def trueup(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TRUEUP, *map(str, arguments)],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=STOP_SECONDS,
            check=False,
        )


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with temporary_home() as home:
        stack = Up(home)
        try:
            yield stack
        finally:
            for process in processes_of(home):
                process.kill()


def answering(home: Path) -> set[str]:
    """Return the names of the workers that answer."""
    with celery_client(Settings(home=home)) as app:
        return {name.partition("@")[0] for answer in app.control.ping(timeout=1.0) for name in answer}


def answer_of(url: str) -> Any:
    """Return the content of a 200 answer, else None."""
    try:
        answer = httpx.get(url, timeout=10, trust_env=False)
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


def test_up_runs_both_workers_and_the_api_and_other_commands_use_it(up: Up) -> None:
    pid = up.start()
    wait_for(lambda: answering(up.home) == {"trueup-ai", "trueup-reconcile"}, "both workers answer")
    servers = server_pids(up.home)
    checked = up.trueup("tokens", "check", 1)
    assert (checked.returncode, checked.stderr) == (3, "")
    assert "no_subscription" in checked.stdout
    assert server_pids(up.home) == servers

    ready = wait_for(lambda: answer_of(f"{up.api}/readyz"), "the API answers")
    assert ready == {"ready": True, "database": "ok", "broker": "ok", "worker": "ok"}
    assert "the bearer token is the user id" in up.log.read_text()
    wait_for(lambda: f"ready: {up.api}/" in up.log.read_text(), "the page's address is printed")
    page = httpx.get(up.api, timeout=10, trust_env=False)
    assert (page.status_code, "Review queue" in page.text) == (200, True)
    link = up.trueup("page", "--by", "ann").stdout.strip()
    assert link.startswith(f"{up.api}/login/")
    assert "Open the page" in httpx.get(link, timeout=10, trust_env=False).text

    second = up.trueup("up")
    assert (second.returncode, second.stdout) == (1, "")
    assert f"process {pid} already runs the stack" in second.stderr
    assert f"kill {pid}" in second.stderr

    denied = up.trueup("run", "qa", "--user", 1, "--wait", Path(__file__).parents[2] / "examples" / "help_en.txt")
    assert denied.returncode == 3
    assert not (up.home / "log" / "temporary-worker.log").exists()
    assert "trueup.generate_qa" in up.log.read_text()


def test_up_refuses_an_address_of_the_api_that_is_in_use_before_it_starts_anything(up: Up) -> None:
    with temporary_home() as home:
        other = Up(home)
        other.port = up.port
        refused = other.trueup("up")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"can't listen on 127.0.0.1:{up.port}: Address already in use" in refused.stderr
        assert_nothing_runs(home)


def test_after_kill_9_a_second_start_takes_over_and_its_stop_leaves_nothing(up: Up) -> None:
    assert up.process is not None
    before = [process for process in processes_of(up.home) if process.pid != up.process.pid]
    workers = [process for process in before if {"celery", "api"} & {Path(word).name for word in process.cmdline()}]
    assert len(workers) >= 4
    assert up.stop(signal.SIGKILL) == -signal.SIGKILL
    assert all(is_alive(process) for process in workers)

    up.log.write_text("")
    up.start()
    assert not any(is_alive(process) for process in workers)
    wait_for(lambda: answering(up.home) == {"trueup-ai", "trueup-reconcile"}, "both workers answer again")

    assert up.stop(signal.SIGINT) == 0
    assert_nothing_runs(up.home)
    assert not Settings(home=up.home).stack_file.exists()
    assert "Traceback" not in up.log.read_text()
