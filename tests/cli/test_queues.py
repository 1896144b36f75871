"""`trueup queues`: dead letters are listed, requeued and dropped."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.conftest import trueup, trueup_json
from trueup.cli.client import celery_client
from trueup.settings.settings import get_settings
from trueup.worker.dead_letters import drop_letters, keep_letter
from trueup.worker.doctor import check_dead_letters

QUEUE = "for-the-test"
MESSAGE = b'{"headers": {"task": "trueup.lost", "id": "t-1"}}'


@pytest.fixture
def redis(database: str) -> Iterator[Any]:
    with celery_client(get_settings()) as app, app.connection_for_write() as connection:
        client = connection.default_channel.client
        drop_letters(client, None)
        yield client
        drop_letters(client, None)
        client.delete(QUEUE)


def test_dead_letters_are_listed_with_their_reason(redis: Any) -> None:
    assert trueup("queues", "dead").stdout == "No dead letters.\n"
    assert [finding.level for finding in check_dead_letters(redis)] == ["ok"]
    keep_letter(redis, QUEUE, b"\xff", "it is no JSON object")
    keep_letter(redis, QUEUE, MESSAGE, "this worker has no task trueup.lost")
    table = trueup("queues", "dead").stdout
    for cell in ("it is no JSON object", "this worker has no task", "trueup.lost", "t-1", QUEUE):
        assert cell in table
    newest, oldest = trueup_json("queues", "dead")["letters"]
    assert (newest["task"], newest["task_id"], newest["preview"]) == ("trueup.lost", "t-1", MESSAGE.decode())
    assert (oldest["task"], base64.b64decode(oldest["message"]), oldest["preview"]) == (None, b"\xff", "\\xff")
    assert len(trueup_json("queues", "dead", "--limit", 1)["letters"]) == 1
    [finding] = check_dead_letters(redis)
    assert (finding.level, finding.detail["letters"]) == ("warning", 2)


def test_dead_letters_are_requeued_and_dropped_by_name_or_all(redis: Any) -> None:
    letters = [keep_letter(redis, QUEUE, MESSAGE, "no task") for _ in range(4)]
    assert trueup("queues", "requeue", letters[0].id).stdout == "Requeued: 1.\n"
    assert redis.lrange(QUEUE, 0, -1) == [MESSAGE]
    assert trueup("queues", "drop", letters[1].id).stdout == "Dropped: 1.\n"
    assert f"letters: {letters[1].id}: no such" in trueup("queues", "drop", letters[1].id, code=1).stderr
    for command in ("requeue", "drop"):
        assert "name dead letters, or give --all" in trueup("queues", command, code=2).stderr
    assert trueup("queues", "requeue", "--all").stdout == "Requeued: 2.\n"
    assert redis.llen(QUEUE) == 3
    assert trueup_json("queues", "dead")["letters"] == []
