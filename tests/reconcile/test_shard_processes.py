"""Jobs that become processes: they do what threads do, and whoever dies leaves the rest to the others."""

import os
import pickle
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from tests.reconcile.test_shards import RULES, counters, missed, plan
from tests.support.books import dump
from tests.support.host import Host
from tests.support.shard_processes import marked_engine, meet_processes
from trueup.database.engine import get_engine
from trueup.errors import ServiceUnavailableError, TrueupError
from trueup.host.mapping import HostMapping
from trueup.reconcile import local_run as reconciliation
from trueup.reconcile import shard_processes
from trueup.reconcile.batch import BatchContext
from trueup.reconcile.jobs import ShardsOfRun
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.reconcile.shard_processes import Order, ProcessEndedError, ShardProcess
from trueup.reconcile.shards import Step, claim_shard, move_shard
from trueup.settings.settings import Settings, get_settings

USERS = 24


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ShardProcess]:
    """The processes that were started, in order; jobs become processes at once."""
    processes = []

    class Noted(ShardProcess):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            processes.append(self)

    monkeypatch.setattr(reconciliation, "ShardProcess", Noted)
    monkeypatch.setattr(reconciliation, "PROCESSES_FROM", 1)
    monkeypatch.setattr(reconciliation, "SMALLEST_SHARD", 2)
    return processes


@pytest.fixture
def run(host: Host, started: list[ShardProcess]) -> Callable[..., RunSummary]:
    def run(make_engine: Callable[[Settings], Any] = marked_engine, **more: Any) -> RunSummary:
        values = {"rules": RULES, "batch_size": 1, "jobs": 2, "make_engine": partial(make_engine, get_settings())}
        return reconcile(get_engine(), HostMapping(), **{**values, **more})

    return run


def assert_each_corrected_once(host: Host) -> None:
    assert counters(host) == [9_700] * USERS
    assert host.value("SELECT count(DISTINCT user_id) = count(*) AND count(*) = :users FROM trueup.drift", users=USERS)


def by_processes(host: Host) -> int:
    done: int = host.value("SELECT count(*) FROM public.by_process")
    return done


def assert_ended(processes: list[ShardProcess]) -> None:
    assert processes
    assert all(process.process.poll() is not None for process in processes)


@pytest.mark.parametrize("jobs", [2, 3])
def test_processes_do_what_threads_do(
    host: Host, run: Callable[..., RunSummary], started: list[ShardProcess], jobs: int
) -> None:
    users = missed(host, USERS)
    meet_processes(host)
    seen: list[tuple[int, int]] = []
    summary = run(jobs=jobs, keep_findings=True, progress=lambda *figures: seen.append(figures))
    assert (summary.status, summary.checked, summary.corrected) == ("finished", USERS, USERS)
    assert sorted(finding.drift.user_id for finding in summary.findings) == users
    assert {finding.explanation.cause for finding in summary.findings} == {"missed_decrement"}
    assert_each_corrected_once(host)
    assert seen[-1] == (USERS, USERS)
    assert len(started) == jobs - 1
    assert by_processes(host) > 0
    assert_ended(started)


def test_a_dry_run_in_processes_finds_the_same_and_writes_nothing(
    host: Host, run: Callable[..., RunSummary], started: list[ShardProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = missed(host, USERS)
    before = dump(host)
    told = absorbed(monkeypatch)
    summary = run(dry_run=True)
    assert dump(host) == before
    assert (summary.checked, summary.drifted, summary.tokens_overstated) == (USERS, USERS, 300 * USERS)
    assert sorted(finding.drift.user_id for finding in summary.findings) == users
    assert sum(part.drifted for part in told) > 0
    assert_ended(started)


def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[RunSummary]:
    """Keep what processes tell; from the third drift on others wait for it, two seconds at most.

    No longer, for the job that waits may be the one that is to become a process.
    """
    told: list[RunSummary] = []
    something = threading.Event()
    own = reconciliation._LocalRun.absorb
    report = reconciliation._LocalRun.report

    def absorb(self: Any, part: RunSummary) -> None:
        own(self, part)
        told.append(part)
        something.set()

    def report_late(self: Any, checked: int, *more: Any) -> None:
        report(self, checked, *more)
        if self.summary.checked > 2:
            something.wait(2)

    monkeypatch.setattr(reconciliation._LocalRun, "absorb", absorb)
    monkeypatch.setattr(reconciliation._LocalRun, "report", report_late)
    return told


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_process_leaves_behind_is_gone_on_with(
    host: Host, run: Callable[..., RunSummary], started: list[ShardProcess], how: signal.Signals
) -> None:
    missed(host, USERS)
    meet_processes(host)

    def end(*_figures: int) -> None:
        if by_processes(host) == 1:
            started[0].process.send_signal(how)

    summary = run(progress=end)
    assert (summary.status, summary.resumed, summary.checked, summary.corrected) == ("finished", False, USERS, USERS)
    assert_each_corrected_once(host)
    assert 0 < by_processes(host) < USERS - 2
    assert_ended(started)


def test_a_dry_run_whose_process_is_killed_says_so(
    host: Host, run: Callable[..., RunSummary], started: list[ShardProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    missed(host, USERS)
    before = dump(host)
    monkeypatch.setattr(ShardProcess, "work", killed_first(ShardProcess.work))
    with pytest.raises(ProcessEndedError, match="ended by signal 9"):
        run(dry_run=True)
    assert dump(host) == before
    assert_ended(started)


def killed_first(work: Callable[..., bool]) -> Callable[..., bool]:
    def killed(self: ShardProcess, *values: Any, **more: Any) -> bool:
        self.process.kill()
        return work(self, *values, **more)

    return killed


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("RAISE EXCEPTION USING ERRCODE = '40P01'", ServiceUnavailableError),
        ("RAISE EXCEPTION USING ERRCODE = '58030', MESSAGE = 'no more paper'", DBAPIError),
    ],
)
def test_an_error_in_a_process_is_the_error_of_the_run(
    host: Host,
    run: Callable[..., RunSummary],
    started: list[ShardProcess],
    raised: str,
    expected: type[Exception],
) -> None:
    missed(host, USERS)
    meet_processes(host, then=raised)
    with pytest.raises(expected):
        run()
    status, error = host.execute("SELECT status, error FROM trueup.reconcile_run").one()
    assert (status, error is None) == ("failed", False)
    assert_ended(started)
    host.execute("DROP TRIGGER meet ON trueup.drift")
    run()
    assert_each_corrected_once(host)


def test_a_process_that_is_asked_to_stop_puts_its_shard_back_after_a_batch(host: Host, connection: Connection) -> None:
    users = missed(host, USERS)
    meet_processes(host, then="PERFORM pg_sleep(0.1)")
    run_id = plan(host)
    shard = claim_shard(connection, run_id, "here")
    assert shard is not None
    stop = threading.Event()
    # When it is at work: asked before, it ends without having begun.
    process = ShardProcess(order(connection, run_id), lambda part: stop.set())
    try:
        assert not process.work(shard, stop)
    finally:
        process.close()
    assert 0 < shard.checked < USERS
    assert shard.cursor == users[shard.checked - 1]
    assert (row_of_shard(host), by_processes(host)) == (("waiting", shard.checked, 0), shard.checked)


def test_the_shard_of_a_process_that_died_is_put_back_where_it_was(host: Host, connection: Connection) -> None:
    users = missed(host, USERS)
    run_id = plan(host)
    shard = claim_shard(connection, run_id, "here")
    assert shard is not None
    move_shard(connection, run_id, Step(number=1, attempt=shard.attempt, cursor=users[4], checked=5), "bigint")
    ShardsOfRun(get_engine(), run_id, "here").put_back(shard, ProcessEndedError(-9))
    assert row_of_shard(host) == ("waiting", 5, 1)


def order(connection: Connection, run_id: int) -> Order:
    return Order(
        make_engine=partial(marked_engine, get_settings()),
        context=BatchContext.read(connection, HostMapping(), dry_run=False, rules=RULES),
        run_id=run_id,
        kind="quick",
        only_user=None,
        batch_size=1,
        scan_timeout_seconds=60,
        keep_findings=False,
        folder=".",
    )


def row_of_shard(host: Host) -> tuple[str, int, int]:
    status, checked, failures = host.execute("SELECT status, checked, failures FROM trueup.reconcile_shard").one()
    return status, checked, failures


def test_an_error_that_does_not_pickle_comes_out_with_its_words() -> None:
    class LocalError(TrueupError):
        pass

    error = shard_processes._portable(LocalError("out of ink"))
    assert (type(error), str(error)) == (TrueupError, "LocalError: out of ink")


def test_where_no_process_can_be_started_the_work_is_done_here(
    host: Host, run: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missed(host, USERS)
    monkeypatch.setattr(shard_processes.sys, "executable", "/nonexistent/python")
    assert run().corrected == USERS
    assert_each_corrected_once(host)
    assert "No process could be started" in caplog.text


def test_a_package_of_the_host_s_in_the_working_folder_is_not_taken_for_ours(
    host: Host, run: Callable[..., RunSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trueup").mkdir()
    (tmp_path / "trueup" / "__init__.py").write_text("raise RuntimeError('the host\\'s own')")
    monkeypatch.chdir(tmp_path)
    missed(host, USERS)
    meet_processes(host)
    assert run().corrected == USERS
    assert by_processes(host) > 0


def test_an_interrupted_run_leaves_no_process_and_can_be_gone_on_with(
    host: Host, run: Callable[..., RunSummary], started: list[ShardProcess]
) -> None:
    missed(host, USERS)
    meet_processes(host)

    def interrupt(*_figures: int) -> None:
        if by_processes(host):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert_ended(started)
    assert host.value("SELECT status FROM trueup.reconcile_run") == "interrupted"
    assert host.value("SELECT count(*) FROM trueup.reconcile_shard WHERE status = 'running'") == 0
    summary = run()
    assert (summary.resumed, summary.checked, summary.corrected) == (True, USERS, USERS)
    assert_each_corrected_once(host)


def test_an_order_that_does_not_pickle_starts_nothing(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host, USERS)
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        run(make_engine=lambda settings: None)
    assert not children()


def children() -> list[str]:
    """The processes that work on shards, of this test's process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"shard_processes" in words and int(parent) == os.getpid():
                found.append(entry.name)
    return found
