"""`trueup doctor`: its output, its exit code, and its findings about Redis and the workers."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from tests.support.schemas import complaints
from tests.support.worker import WorkerProcess, running_worker
from trueup.cli import client
from trueup.cli.client import celery_client
from trueup.doctor.clocks import Offset
from trueup.settings.settings import Settings, get_settings
from trueup.worker import doctor
from trueup.worker.doctor import QueueDepth

SCHEMA = "doctor.schema.json"
NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def _no_long_wait_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.5)


@pytest.fixture
def queues(database: str) -> Iterator[Celery]:
    """The application to send tasks with, and no messages in its queues before or after."""
    with celery_client(get_settings()) as app:
        app.control.purge()
        yield app
        app.control.purge()


def of(findings: list[dict[str, Any]], check: str) -> list[tuple[str, str]]:
    return [(finding["level"], finding["what"]) for finding in findings if finding["check"] == check]


def test_without_a_worker_it_fails_and_says_how_to_start_one(queues: Celery) -> None:
    result = trueup("doctor", code=1)
    assert "celery -A trueup.worker worker -Q" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 error, ")
    lines = [line for line in result.stdout.splitlines() if line.startswith("│ ")]
    assert lines[0].startswith("│ error ")  # errors come first


def test_tasks_in_a_queue_without_a_worker_are_an_error(queues: Celery) -> None:
    for priority in (0, 9):
        queues.send_task("trueup.expire_holds", queue="trueup-reconcile", priority=priority)
    document = trueup_json("doctor", code=1)
    told = dict(of(document["findings"], "queues"))["error"]
    assert re.fullmatch(
        r"In queue trueup-reconcile 2 tasks wait, the oldest for \d+ s, and no worker consumes it\.", told
    )


def test_a_server_that_is_away_hides_nothing_of_the_other(
    host: Host, settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 1.0)
    settings(TRUEUP_BROKER_URL=f"redis://:hunter2@{NOWHERE}/0")
    without_redis = trueup_json("doctor", code=1)
    assert of(without_redis["findings"], "books")[0][0] == "ok"
    assert of(without_redis["findings"], "redis")[0][0] == "error"
    settings(TRUEUP_DATABASE_URL=f"postgresql://app:hunter2@{NOWHERE}/app")
    without_both = trueup_json("doctor", code=1)
    assert {finding["check"] for finding in without_both["findings"] if finding["level"] == "error"} == {
        "database",
        "redis",
    }
    assert "hunter2" not in json.dumps([without_redis, without_both])
    assert complaints(without_both, SCHEMA) == []


def test_without_a_database_redis_is_still_checked(host: Host, settings: Callable[..., None]) -> None:
    settings(TRUEUP_DATABASE_URL=f"postgresql://app@{NOWHERE}/app")
    findings = trueup_json("doctor", code=1)["findings"]
    level, told = of(findings, "redis")[0]
    assert level == "ok"
    assert re.fullmatch(r"(Redis|Valkey) \d+\.\d+\.\d+\.", told)
    assert "this machine's" in of(findings, "redis_clock")[0][1]


def test_settings_that_cant_be_read_are_a_finding_and_not_a_failure(settings: Callable[..., None]) -> None:
    settings(TRUEUP_HOLD_TTL="9")
    document = trueup_json("doctor", code=1)
    assert [finding["check"] for finding in document["findings"]] == ["python", "packages", "settings"]
    assert "Did you mean TRUEUP_HOLD_TTL_SECONDS?" in document["findings"][-1]["what"]
    assert complaints(document, SCHEMA) == []


@pytest.mark.parametrize(
    "change",
    [
        {"level": "fatal"},
        {"check": "unheard of"},
        {"remedy": None},
        {"level": "ok"},
        {"detail": []},
        {"what": ""},
    ],
)
def test_the_schema_refuses_malformed_findings(change: dict[str, Any]) -> None:
    finding = {"check": "redis", "level": "error", "what": "x", "remedy": "y", "detail": {}}
    document = {"schema_version": 1, "checked_at": "2024-11-01T00:00:00+00:00", "healthy": False}
    document |= {"errors": 1, "warnings": 0}
    assert complaints(document | {"findings": [finding]}, SCHEMA) == []
    assert complaints(document | {"findings": [finding | change]}, SCHEMA) != []


class FakeRedis:
    """What a Redis of another making would answer; ours can't be made unsafe for a test."""

    def __init__(self, **info: Any) -> None:
        self.answers = {"redis_version": "8.2.3", "maxmemory_policy": "noeviction", "aof_enabled": 1} | info

    def info(self) -> dict[str, Any]:
        return self.answers

    def time(self) -> tuple[int, int]:
        return 0, 0


@pytest.mark.parametrize(
    ("info", "level", "remedy"),
    [
        ({"redis_version": "6.0.16"}, "error", "6.2 or newer"),
        ({"maxmemory_policy": "allkeys-lru"}, "error", "noeviction"),
        ({"aof_enabled": 0}, "warning", "appendonly yes"),
    ],
)
def test_a_redis_that_may_lose_tasks_is_reported(info: dict[str, Any], level: str, remedy: str) -> None:
    findings = [finding for finding in doctor.check_server(FakeRedis(**info)) if finding.level != "ok"]
    assert [(finding.level, remedy in str(finding.remedy)) for finding in findings] == [(level, True)]


def test_valkey_is_named_with_its_own_version() -> None:
    found = list(doctor.check_server(FakeRedis(redis_version="7.2.4", valkey_version="9.1.2")))
    assert [(finding.level, finding.what) for finding in found] == [("ok", "Valkey 9.1.2.")]


def test_redis_clock_is_compared_with_the_databases() -> None:
    [finding] = doctor.check_clock(FakeRedis(), Offset(seconds=0, uncertainty=0))
    assert (finding.level, "the database's" in finding.what) == ("error", True)


@pytest.mark.parametrize(("age", "level"), [(10, "ok"), (5_000, "error")])
def test_a_task_that_exceeds_the_time_limit_is_reported(age: float, level: str) -> None:
    active = {
        "trueup-ai@a": [{"name": "tasks.run", "id": "1", "time_start": 1e9 - age}, {"name": "x", "time_start": None}]
    }
    [finding] = doctor._hanging(active.items(), Settings(), 1e9)
    assert (finding.level, finding.detail["seconds"]) == (level, age)


@pytest.mark.parametrize(
    ("queue", "length", "oldest", "served", "level"),
    [
        ("trueup-ai", 0, None, False, "ok"),
        ("trueup-ai", 1, None, False, "error"),
        ("trueup-ai", 999, 599, True, "ok"),
        ("trueup-ai", 999, 600, True, "warning"),
        ("trueup-ai", 1000, None, True, "warning"),
        ("trueup-reconcile", 0, None, False, "warning"),
    ],
)
def test_a_queue_is_judged_by_its_length_its_age_and_by_who_takes_from_it(
    queue: str, length: int, oldest: float | None, served: bool, level: str
) -> None:
    waiting = QueueDepth(length=length, oldest_seconds=oldest)
    finding = doctor._queue(queue, waiting, served=served, may_idle=queue == "trueup-ai")
    assert (finding.level, finding.detail["length"], finding.detail["oldest_seconds"]) == (level, length, oldest)


# Last: its worker lives as long as the module.


def test_workers_that_take_ai_tasks_without_a_provider_are_an_error(
    worker: WorkerProcess, settings: Callable[..., None]
) -> None:
    settings(TRUEUP_MODEL_PROVIDER=None)
    findings = trueup_json("doctor", code=1)["findings"]
    assert [finding["check"] for finding in findings if finding["level"] == "error"] == ["workers"]
    [finding] = [finding for finding in findings if finding["level"] == "error"]
    assert "no model provider is set" in finding["what"]
    assert "TRUEUP_MODEL_PROVIDER" in finding["remedy"]


def test_with_a_worker_all_is_well_but_for_the_tests_own_role(
    worker: WorkerProcess, shared_host: Host, tmp_path: Path
) -> None:
    document = trueup_json("doctor")
    assert [finding["check"] for finding in document["findings"] if finding["level"] == "error"] == []
    [(level, told)] = of(document["findings"], "workers")
    assert (level, told.startswith("Workers answer: celery@")) == ("ok", True)
    assert [level for level, _ in of(document["findings"], "queues")] == ["ok", "ok"]
    assert of(document["findings"], "redis_clock")[0][0] == "ok"
    assert (document["healthy"], document["errors"]) == (True, 0)
    assert document["warnings"] > 0
    trueup("doctor", "--strict", code=1)
    assert complaints(document, SCHEMA) == []


def test_workers_with_one_node_name_are_told_and_the_queues_of_both_count(
    worker: WorkerProcess, shared_host: Host, tmp_path: Path
) -> None:
    """Celery's own `inspect` shows the queues of only one of them."""
    with running_worker(tmp_path / "second.log", queues=("another",), concurrency=1):
        findings = trueup_json("doctor")["findings"]
    level, told = of(findings, "workers")[1]
    assert (level, told.startswith("2 workers have the node name celery@")) == ("warning", True)
    assert [level for level, _ in of(findings, "queues")] == ["ok", "ok"]
