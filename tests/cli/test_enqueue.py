"""`trueup run --wait` without a worker: the command starts a temporary worker, and leaves no process."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import assert_nothing_runs, started
from tests.stack.helpers import temporary_home
from tests.support.demo import Demo, processes_of
from tests.support.waiting import wait_for
from trueup.settings.settings import Settings
from trueup.stack.children import ChildRecords
from trueup.stack.errors import StackError
from trueup.stack.locks import FileLock
from trueup.stack.processes import is_alive
from trueup.stack.temporary import GRACE_SECONDS, TemporaryWorker

ARTICLE = Path(__file__).parents[2] / "examples" / "help_en.txt"
RUN = ("run", "qa", "--user", 1, "--max-pairs", 2, "--wait", ARTICLE)
RUN_SECONDS = 60.0


def worker_pid(home: Path) -> int:
    """Return the temporary worker's pid once it is on record."""
    records = ChildRecords(home / "run" / "temporary-worker.json")
    return wait_for(records.read, "a temporary worker is on record", seconds=RUN_SECONDS)[0].pid


def test_ctrl_c_ends_the_waiting_its_worker_and_its_servers(demo: Demo) -> None:
    for _ in range(5):  # on a busy machine the result may come before the signal
        with started(*RUN, home=demo.home) as command:
            worker_pid(demo.home)
            os.killpg(command.pid, signal.SIGINT)
            output, errors = command.communicate(timeout=GRACE_SECONDS + RUN_SECONDS)
        if command.returncode != 0:
            break
    assert (command.returncode, output) == (1, "")
    assert "is not cancelled" in errors
    assert "Traceback" not in errors
    assert_nothing_runs(demo.home)


def test_two_commands_share_a_worker_and_end_the_processes_of_a_killed_command(demo: Demo) -> None:
    with started(*RUN, home=demo.home) as killed:
        pid = worker_pid(demo.home)
        killed.kill()
        killed.wait()
    left = [process for process in processes_of(demo.home) if process.pid == pid]
    assert [is_alive(process) for process in left] == [True]

    with ExitStack() as stack:
        for command in [stack.enter_context(started(*RUN, home=demo.home)) for _ in range(2)]:
            output, errors = command.communicate(timeout=RUN_SECONDS)
            assert (command.returncode, errors) == (0, "")
            assert '"pairs"' in output
    assert not is_alive(left[0])
    assert_nothing_runs(demo.home)


@pytest.fixture
def settings_without_servers() -> Iterator[Settings]:
    with temporary_home() as home:
        yield Settings(home=home, database_url=None, broker_url=None)


@pytest.fixture
def temporary(settings_without_servers: Settings) -> Iterator[TemporaryWorker]:
    """A worker that ends at once, because it has no broker."""
    worker = TemporaryWorker(settings_without_servers)
    yield worker
    worker.stop()
    assert_nothing_runs(settings_without_servers.home)


def test_when_the_first_commands_worker_has_ended_the_second_starts_its_own(
    settings_without_servers: Settings, temporary: TemporaryWorker
) -> None:
    run = settings_without_servers.home / "run"
    records = ChildRecords(run / "temporary-worker.json")
    first = FileLock(run / "temporary-worker.lock")
    assert first.try_exclusive()
    temporary.tend()
    assert records.read() == []
    first.release()
    temporary.tend()
    assert len(records.read()) == 1


def test_a_worker_that_dies_is_not_waited_for(
    settings_without_servers: Settings, temporary: TemporaryWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [name for name in os.environ if name.startswith("TRUEUP_")]:
        monkeypatch.delenv(variable)
    temporary.tend()
    log = settings_without_servers.home / "log" / "temporary-worker.log"
    process = psutil.Process(worker_pid(settings_without_servers.home))
    wait_for(lambda: not is_alive(process), "the worker has ended")
    message = r"(?s)ended with code 1.*TRUEUP_BROKER_URL is not set.*stays enqueued"
    with pytest.raises(StackError, match=message) as raised:
        temporary.tend()
    assert str(log) in str(raised.value)
