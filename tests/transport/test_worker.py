"""The makers' SDKs in a real worker whose processes are killed in the middle of calls."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from celery import Celery

from tests.support import sdk_tasks, traced_worker
from tests.support.host import Host
from tests.support.makers import Maker
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess, close_connections, own_application, running_worker
from trueup.settings.settings import get_settings
from trueup.tasks.requests import CELERY_RETRIES_LOST_TASKS


@pytest.fixture
def app(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    monkeypatch.setenv("TRUEUP_MODEL_TIMEOUT_SECONDS", "0.5")
    monkeypatch.delenv("TRUEUP_MODEL_PROVIDER")  # the bodies take no model
    get_settings.cache_clear()
    app = own_application()
    app.control.purge()
    yield app
    close_connections(app)


@pytest.fixture
def worker(app: Celery, tmp_path: Path) -> Iterator[WorkerProcess]:
    include = ("tests.support.short_leases", "tests.support.sdk_tasks")
    with running_worker(tmp_path / "worker.log", include=include) as worker:
        yield worker


class Killer:
    """Kills a process of a worker's pool with SIGKILL each time that the ledger has grown by some lines."""

    def __init__(self, worker: WorkerProcess, maker: Maker, every: int, times: int) -> None:
        self.killed = 0
        self._worker, self._maker, self._every, self._times = worker, maker, every, times
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self.killed < self._times and not self._stop.wait(0.002):
            pool = self._worker.pool()
            if len(self._maker.ledger) >= self._every * (self.killed + 1) and pool:
                self._kill(pool[0])

    def _kill(self, process: psutil.Process) -> None:
        process.kill()
        self.killed += 1


@pytest.mark.skipif(not CELERY_RETRIES_LOST_TASKS, reason="this Celery fails the tasks of a killed process")
@pytest.mark.parametrize(
    ("sdk", "tasks"), [("openai", 8), *(pytest.param(sdk, 50, marks=pytest.mark.long) for sdk in sdk_tasks.SDKS)]
)
def test_with_killed_processes_each_call_is_charged_once_as_the_server_billed_it(
    sdk: str, tasks: int, app: Celery, worker: WorkerProcess, maker: Maker, host: Host
) -> None:
    maker.length = sdk_tasks.LENGTH
    user = host.subscriber(1_000_000)
    with Killer(worker, maker, every=tasks, times=3) as killer:
        results = [sdk_tasks.mix.delay(user_id=user, sdk=sdk, url=maker.url, number=number) for number in range(tasks)]
        words = [result.get(timeout=DEADLINE_SECONDS) for result in results]
    assert killer.killed >= 2
    assert words == [sdk_tasks.CALLS * sdk_tasks.LENGTH] * tasks
    wait_for(lambda: not host.value("SELECT count(*) FROM trueup.hold WHERE status = 'open'"), "all holds have ended")
    charged = Counter(host.execute("SELECT tokens_total FROM trueup.charge").scalars())
    billed = Counter(line.total for line in maker.ledger)
    # A call that was killed between the server's bill and our charge is bought again, and listed as unrecorded.
    unrecorded = host.value("SELECT count(*) FROM trueup.call_intent")
    assert not charged - billed, "nothing is charged that was not billed"
    assert (billed - charged).total() <= unrecorded <= killer.killed
    assert charged.total() == sdk_tasks.CALLS * tasks, "each call is charged once"
    assert host.used(user) == sum(tokens * times for tokens, times in charged.items())
    assert host.value("SELECT max(tokens_charged - tokens_reserved) FROM trueup.hold") <= 0


def test_the_spans_of_a_worker_s_task_are_in_the_trace_of_its_host(
    app: Celery, maker: Maker, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's processes set their SDK up after the fork, when trueup is loaded."""
    file = tmp_path / "spans.jsonl"
    monkeypatch.setenv(traced_worker.SPANS_FILE, str(file))
    user = host.subscriber(100_000)
    include = ("tests.support.sdk_tasks", "tests.support.traced_worker")
    with running_worker(tmp_path / "worker.log", include=include):
        task = sdk_tasks.mix.delay(user_id=user, sdk="openai", url=maker.url, number=1)
        task.get(timeout=DEADLINE_SECONDS)
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    names = {span["context"]["span_id"]: span["name"] for span in spans}
    parents = Counter((span["name"], names.get(span["parent_id"])) for span in spans)
    run, call = "run/test.sdk_mix", "chat gpt-4o-mini"
    assert parents[run, None] == 1
    assert parents["trueup.gate", run] == 1
    assert parents["trueup.charge", call] == sum(count for (name, _), count in parents.items() if name == call) == 4
    assert len({span["context"]["trace_id"] for span in spans}) == 1
    charged = [span["attributes"]["trueup.tokens.charged"] for span in spans if span["name"] == "trueup.charge"]
    assert sum(charged) == maker.billed == host.used(user)
    assert {span["attributes"]["trueup.task_id"] for span in spans if span["name"] == call} == {task.id}
