"""The length and age of queues with messages of real senders."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, group

from trueup.tasks.queues import AI_QUEUE, RECONCILE_QUEUE, SENT_AT_HEADER
from trueup.worker.doctor import PRIORITIES, QueueDepth, read_queue_depth

pytestmark = pytest.mark.dated


@pytest.fixture
def redis(app: Celery) -> Iterator[Any]:
    """The broker's Redis, with nothing in the queues before or after."""
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        keys = [f"{queue}{priority}" for queue in (AI_QUEUE, RECONCILE_QUEUE) for priority in PRIORITIES]
        client.delete(*keys)
        yield client
        client.delete(*keys)


def aged(redis: Any, key: str, seconds: float, *, place: int = -1, **headers: Any) -> None:
    """Make a message in a queue as old as that; the one sent first, if no place is given."""
    message = json.loads(redis.lindex(key, place))
    assert abs(datetime.now(UTC) - datetime.fromisoformat(message["headers"][SENT_AT_HEADER])) < timedelta(seconds=30)
    sent_at = datetime.now(UTC) - timedelta(seconds=seconds)
    message["headers"] |= {SENT_AT_HEADER: sent_at.isoformat()} | headers
    redis.lset(key, place, json.dumps(message))


def ways_to_send(app: Celery) -> dict[str, Callable[[], object]]:
    task = app.tasks["trueup.expire_holds"]
    return {
        "delay": task.delay,
        "by name": lambda: app.send_task("trueup.expire_holds", queue="trueup-reconcile"),
        "in a group": lambda: group([task.s()]).apply_async(),
        "urgent": lambda: task.apply_async(priority=9),
        "with headers": lambda: task.apply_async(headers={SENT_AT_HEADER: "2020-01-01T00:00:00+00:00", "mine": 1}),
    }


@pytest.mark.parametrize("way", ["delay", "by name", "in a group", "urgent", "with headers"])
def test_each_message_says_when_it_was_sent(app: Celery, redis: Any, way: str) -> None:
    assert read_queue_depth(redis, "trueup-reconcile") == QueueDepth(length=0, oldest_seconds=None)
    ways_to_send(app)[way]()
    waiting = read_queue_depth(redis, "trueup-reconcile")
    assert (waiting.length, 0 <= (waiting.oldest_seconds or 0) < 30) == (1, True)
    assert waiting.oldest_seconds is not None
    assert read_queue_depth(redis, "trueup-ai").length == 0


def test_the_oldest_counts_of_all_priorities(app: Celery, redis: Any) -> None:
    task = app.tasks["trueup.expire_holds"]
    for priority in (None, None, 9):
        task.apply_async(priority=priority)
    aged(redis, "trueup-reconcile", 50)
    aged(redis, "trueup-reconcile\x06\x169", 700)
    waiting = read_queue_depth(redis, "trueup-reconcile")
    assert (waiting.length, round(waiting.oldest_seconds or 0, -1)) == (3, 700)
    assert str(waiting).startswith("3 tasks wait, the oldest for 70")


def test_a_message_that_is_not_due_waits_only_from_then_on(app: Celery, redis: Any) -> None:
    task = app.tasks["trueup.expire_holds"]
    task.apply_async(countdown=3600)
    aged(redis, "trueup-reconcile", 900)
    assert read_queue_depth(redis, "trueup-reconcile") == QueueDepth(length=1, oldest_seconds=0)
    aged_eta = (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    task.apply_async()
    aged(redis, "trueup-reconcile", 900, place=0, eta=aged_eta)
    assert round(read_queue_depth(redis, "trueup-reconcile").oldest_seconds or 0, -1) == 100


@pytest.mark.parametrize(
    "headers",
    [
        {"redelivered": True},
        {SENT_AT_HEADER: "yesterday"},
        {SENT_AT_HEADER: 5},
        {SENT_AT_HEADER: ""},
        {"eta": "soon"},
        {"eta": "9999-12-31T23:59:59-05:00"},
    ],
)
def test_a_message_without_a_known_send_time_has_no_age(app: Celery, redis: Any, headers: dict[str, Any]) -> None:
    app.tasks["trueup.expire_holds"].delay()
    aged(redis, "trueup-reconcile", 900, **headers)
    assert read_queue_depth(redis, "trueup-reconcile") == QueueDepth(length=1, oldest_seconds=None)
    app.tasks["trueup.expire_holds"].delay()
    assert (read_queue_depth(redis, "trueup-reconcile").oldest_seconds or 0) < 30


@pytest.mark.parametrize("message", ["nonsense", "[]", "{}", '{"headers": null}', '{"headers": []}', b"\xff"])
def test_a_message_that_is_no_task_is_counted(redis: Any, message: str | bytes) -> None:
    redis.lpush("trueup-ai", message)
    assert read_queue_depth(redis, "trueup-ai") == QueueDepth(length=1, oldest_seconds=None)


def test_messages_for_other_queues_are_left_as_they_are(app: Celery, redis: Any) -> None:
    app.send_task("a.host.s", queue="mail")
    [message] = redis.lrange("mail", 0, -1)
    redis.delete("mail")
    assert SENT_AT_HEADER not in json.loads(message)["headers"]
