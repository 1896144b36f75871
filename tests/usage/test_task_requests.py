"""Each idempotency key has one task, and each task has one owner."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.sessions import run_at_once
from trueup.database.engine import connect
from trueup.usage.task_requests import (
    KEPT,
    TaskRequest,
    begin_request,
    find_request,
    find_request_of_task,
    fingerprint_of,
    mark_sent,
    prune_requests,
)

pytestmark = pytest.mark.dated

NOW = datetime(2024, 11, 22, 12, tzinfo=UTC)
USER, OTHER = 7, 8


def begin(connection: Connection, user: int = USER, key: str = "key-1", **more: Any) -> TaskRequest:
    values = {"fingerprint": "f", "task": "trueup.ask_question", "task_id": str(uuid.uuid4()), "now": NOW}
    return begin_request(connection, user_id=user, idempotency_key=key, **{**values, **more})


def test_the_same_key_returns_the_first_request_unchanged(host: Host, connection: Connection) -> None:
    first = begin(connection)
    again = begin(connection, fingerprint="other", task="trueup.generate_prompt", now=NOW + timedelta(hours=1))
    assert again == first
    assert first.sent_at is None
    mark_sent(connection, first, now=NOW + timedelta(seconds=1))
    mark_sent(connection, first, now=NOW + timedelta(seconds=9))
    assert begin(connection).sent_at == NOW + timedelta(seconds=1)


def test_a_key_belongs_to_one_user(host: Host, connection: Connection) -> None:
    assert begin(connection).task_id != begin(connection, OTHER).task_id


def test_a_task_is_found_only_by_its_owner(host: Host, connection: Connection) -> None:
    mine = begin(connection)
    assert find_request_of_task(connection, USER, mine.task_id, now=NOW) == mine
    assert find_request_of_task(connection, OTHER, mine.task_id, now=NOW) is None
    assert find_request(connection, USER, "key-1", now=NOW) == mine
    assert find_request(connection, OTHER, "key-1", now=NOW) is None


def test_after_a_day_a_request_is_unknown_and_its_key_is_free(host: Host, connection: Connection) -> None:
    first, later = begin(connection), NOW + KEPT
    assert find_request(connection, USER, "key-1", now=later - timedelta(seconds=1)) == first
    assert find_request(connection, USER, "key-1", now=later) is None
    assert find_request_of_task(connection, USER, first.task_id, now=later) is None
    second = begin(connection, now=later)
    assert second.task_id != first.task_id
    assert find_request(connection, USER, "key-1", now=later) == second


def test_old_requests_are_pruned_in_batches_and_others_stay(host: Host, connection: Connection) -> None:
    for number in range(3):
        begin(connection, key=f"old-{number}")
    young = begin(connection, key="young", now=NOW + timedelta(hours=2))
    later = NOW + KEPT + timedelta(hours=1)
    assert [prune_requests(connection, limit=2, now=later) for _ in range(3)] == [2, 1, 0]
    assert host.value("SELECT string_agg(task_id, ',') FROM trueup.task_request") == young.task_id


def test_concurrent_requests_with_one_key_are_one_task(host: Host) -> None:
    def work() -> str:
        with connect() as connection:
            return begin(connection, now=None).task_id

    assert len(set(run_at_once([work] * 4))) == 1


@pytest.mark.parametrize(
    "other", [("tasks.b", {"x": 1}), ("tasks.a", {"x": 2}), ("tasks.a", {"x": "1"}), ("tasks.a", {"x": 1, "y": None})]
)
def test_a_fingerprint_is_of_the_task_and_its_arguments(other: tuple[str, dict[str, Any]]) -> None:
    assert fingerprint_of("tasks.a", {"x": 1}) != fingerprint_of(*other)
    assert fingerprint_of("tasks.a", {"x": 1, "y": 2}) == fingerprint_of("tasks.a", {"y": 2, "x": 1})
