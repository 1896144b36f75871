"""The temporary worker of `trueup run --wait`. tests/cli/test_demo.py has whole commands on the demo's data."""

import os
from collections.abc import Iterator

import psutil
import pytest

from tests.cli.conftest import assert_nothing_runs
from tests.stack.helpers import temporary_home
from tests.support.waiting import wait_for
from trueup.settings.settings import Settings
from trueup.stack.children import ChildRecords
from trueup.stack.errors import StackError
from trueup.stack.locks import FileLock
from trueup.stack.processes import is_alive
from trueup.stack.temporary import TemporaryWorker


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
    [record] = ChildRecords(settings_without_servers.home / "run" / "temporary-worker.json").read()
    process = psutil.Process(record.pid)
    wait_for(lambda: not is_alive(process), "the worker has ended")
    message = r"(?s)ended with code 1.*TRUEUP_BROKER_URL is not set.*stays enqueued"
    with pytest.raises(StackError, match=message) as raised:
        temporary.tend()
    assert str(log) in str(raised.value)
