"""Scheduled reconciling with real beats and workers: one run for each period, even if a process dies."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import running_worker
from trueup.errors import MissingExtraError
from trueup.settings.settings import Settings, get_settings
from trueup.worker.config import beat_schedule, celery_config

CELERY = Path(sys.executable).with_name("celery")


def subscribe_many(host: Host, first: int, count: int) -> None:
    """Make so many users at once, each with a row that was logged and never subtracted."""
    values = {"first": first, "last": first + count - 1, "plan": host.plan(1_000)}
    users = "FROM generate_series(CAST(:first AS int), CAST(:last AS int)) i"
    host.execute(f"INSERT INTO accounts_user SELECT i, 'many' || i, '' {users}", **values)
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
        f"SELECT i, i, :plan, '2024-11-01', 1000 {users}",
        **values,
    )
    host.execute(
        "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) "
        f"SELECT i, 'chat', 300, '2024-11-02' {users}",
        **values,
    )


@pytest.fixture(autouse=True)
def _no_runs(shared_host: Host) -> None:
    shared_host.execute("DELETE FROM trueup.reconcile_run; DELETE FROM trueup.reconcile_shard")


def send(app: Celery, name: str, **arguments: Any) -> Any:
    return app.tasks[f"trueup.{name}"].apply_async(kwargs=arguments).get(timeout=DEADLINE_SECONDS)


def statuses(host: Host) -> list[tuple[int, str]]:
    rows = host.execute("SELECT count(*), status FROM trueup.reconcile_run GROUP BY status")
    return [tuple(row) for row in rows]


def test_the_schedule_requests_one_run_for_each_period() -> None:
    schedule = beat_schedule(Settings(reconcile_interval_seconds=900))
    assert schedule["reconcile-counters"]["kwargs"] == {"scheduled": True}
    assert schedule["reconcile-deep"]["kwargs"] == {"scheduled": True, "deep": True}
    assert schedule["reconcile-deep"]["schedule"] == timedelta(seconds=600)
    assert schedule["sweep-runs"]["options"]["queue"] == "trueup-reconcile"
    assert "reconcile-deep" not in beat_schedule(Settings(reconcile_deep_interval_seconds=0))


def test_redbeat_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(beat_scheduler="redbeat", broker_url="redis://localhost:6379/0")
    monkeypatch.setitem(sys.modules, "redbeat", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trueup\[redbeat\]'; or unset the setting"):
        celery_config(settings)


def test_a_period_has_one_run_however_often_it_is_asked_for(app: Celery, shared_host: Host, tmp_path: Path) -> None:
    with running_worker(tmp_path / "worker.log", queues=("trueup-reconcile",)):
        assert send(app, "reconcile_counters", scheduled=True)["status"] == "finished"
        assert "period" in send(app, "reconcile_counters", scheduled=True)["skipped"]
        assert send(app, "reconcile_counters", scheduled=True, deep=True)["defects"] == 0
        assert "period" in send(app, "reconcile_counters", scheduled=True, deep=True)["skipped"]
        assert send(app, "reconcile_counters")["status"] == "finished"
    assert statuses(shared_host) == [(3, "finished")]


def test_a_large_run_is_shared_and_ended_by_its_last_shard(
    app: Celery, shared_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe_many(shared_host, 100_000, 2_500)
    monkeypatch.setenv("TRUEUP_RECONCILE_SHARD_SIZE", "1000")
    with running_worker(tmp_path / "worker.log", queues=("trueup-reconcile",)):
        send(app, "reconcile_counters", scheduled=True)
        wait_for(lambda: statuses(shared_host) == [(1, "finished")], "the run is finished")
    left = "SELECT count(*) FROM billing_subscription WHERE user_id >= 100000 AND tokens_remaining <> 700"
    assert shared_host.value(left) == 0
    checked, shards = shared_host.execute(
        "SELECT r.checked, count(*) FROM trueup.reconcile_run r JOIN trueup.reconcile_shard s ON s.run_id = r.id "
        "GROUP BY r.id"
    ).one()
    assert checked == shared_host.value("SELECT count(*) FROM billing_subscription")
    assert shards == -(-checked // 1000) > 1


def test_another_machine_resumes_the_shard_of_a_killed_worker(
    app: Celery, shared_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe_many(shared_host, 200_000, 1_500)
    monkeypatch.setenv("TRUEUP_RECONCILE_SHARD_SIZE", "1000")
    monkeypatch.setenv("TRUEUP_RECONCILE_BATCH_SIZE", "10")
    drifts = "SELECT count(*) FROM trueup.drift WHERE user_id >= 200000"
    with running_worker(tmp_path / "dies.log", queues=("trueup-reconcile",), concurrency=1) as dying:
        app.tasks["trueup.reconcile_counters"].apply_async(kwargs={"scheduled": True})
        wait_for(lambda: shared_host.value(drifts) >= 20, "it is in the middle")
        dying.kill()
    wait_for(
        lambda: not shared_host.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trueup'"),
        "its sessions are gone",
    )
    done = shared_host.value(drifts)
    assert 20 <= done < 1_500
    for table in ("reconcile_run", "reconcile_shard"):
        shared_host.execute(f"UPDATE trueup.{table} SET lease_until = now() WHERE lease_until IS NOT NULL")
    app.control.purge()
    with running_worker(tmp_path / "other.log", queues=("trueup-reconcile",)):
        assert send(app, "sweep_runs")["shards"] >= 1
        wait_for(lambda: statuses(shared_host) == [(1, "finished")], "the run is finished")
    assert shared_host.value(drifts) == 1_500
    assert (
        shared_host.value(
            "SELECT count(*) FROM billing_subscription WHERE user_id >= 200000 AND tokens_remaining <> 700"
        )
        == 0
    )


@contextmanager
def beats(folder: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run so many real beats, each with a schedule file of its own; killed at the end."""
    running = []
    try:
        for number in range(count):
            log = (folder / f"beat{number}.log").open("wb")
            command = [CELERY, "-A", "trueup.worker", "beat", "--pidfile="]
            if get_settings().beat_scheduler == "file":
                command += ["--schedule", str(folder / f"schedule{number}")]
            running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            log.close()
        yield running
    finally:
        for beat in running:
            if beat.poll() is None:
                os.killpg(beat.pid, signal.SIGKILL)
            beat.wait(DEADLINE_SECONDS)


def redis_of(app: Celery) -> Redis:
    return Redis(unix_socket_path=app.conf.broker_url.removeprefix("redis+socket://"))


def sent_at(app: Celery, task: str) -> list[datetime]:
    """Return when each message of that task was sent: all of them are still in the queue."""
    times = []
    with redis_of(app) as redis:
        for message in redis.lrange("trueup-reconcile", 0, -1):
            headers = json.loads(message)["headers"]
            if headers["task"] == task:
                times.append(datetime.fromisoformat(headers["expires"]) - timedelta(seconds=1))
    return sorted(times)


def test_of_two_redbeats_one_sends_also_when_the_other_is_killed(
    app: Celery, shared_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("redbeat")
    monkeypatch.setenv("TRUEUP_BEAT_SCHEDULER", "redbeat")
    monkeypatch.setenv("TRUEUP_BEAT_LOCK_SECONDS", "5")
    monkeypatch.setenv("TRUEUP_EXPIRE_INTERVAL_SECONDS", "2")
    get_settings.cache_clear()
    app.control.purge()
    with redis_of(app) as redis:
        for key in redis.scan_iter("trueup-beat:*"):
            redis.delete(key)

    def holders() -> list[int]:
        return [number for number in (0, 1) if "Acquired lock" in (tmp_path / f"beat{number}.log").read_text()]

    with beats(tmp_path, 2) as running:
        wait_for(lambda: len(sent_at(app, "trueup.expire_holds")) >= 3, "the first beat sends")
        (first,) = holders()
        os.killpg(running[first].pid, signal.SIGKILL)
        running[first].wait(DEADLINE_SECONDS)
        before = len(sent_at(app, "trueup.expire_holds"))
        wait_for(lambda: len(sent_at(app, "trueup.expire_holds")) >= before + 3, "the other beat sends")
        assert holders() == [0, 1]
    times = sent_at(app, "trueup.expire_holds")
    app.control.purge()
    assert [pair for pair in pairwise(times) if pair[1] - pair[0] < timedelta(seconds=1.5)] == []


def test_two_plain_beats_make_one_run_a_period_also_when_one_is_killed(
    app: Celery, shared_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_RECONCILE_INTERVAL_SECONDS", "10")
    get_settings.cache_clear()
    app.control.purge()
    with running_worker(tmp_path / "worker.log", queues=("trueup-reconcile",)) as worker, beats(tmp_path, 2) as running:
        asked = "trueup.reconcile_counters"
        wait_for(lambda: worker.output.count(asked) >= 4, "both have asked for a run")
        os.killpg(running[0].pid, signal.SIGKILL)
        running[0].wait(DEADLINE_SECONDS)
        runs = shared_host.value("SELECT count(*) FROM trueup.reconcile_run")
        wait_for(
            lambda: shared_host.value("SELECT count(*) FROM trueup.reconcile_run") > runs,
            "the other goes on",
            seconds=30,
        )
    assert shared_host.value(
        "SELECT count(*) = count(DISTINCT period) AND bool_and(period IS NOT NULL) FROM trueup.reconcile_run"
    )
    assert shared_host.value("SELECT max(extract(epoch FROM period)::bigint % 10) FROM trueup.reconcile_run") == 0
