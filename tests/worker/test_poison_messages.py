"""Messages that no worker can read: each is taken out of the way, kept as a dead letter, and stops no worker."""

import base64
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess
from trueup.tasks.queues import AI_QUEUE
from trueup.worker.dead_letters import MAX_LETTERS, DeadLetter, drop_letters, keep_letter, list_letters, requeue_letters
from trueup.worker.messages import find_problem


@pytest.fixture
def redis(app: Celery) -> Iterator[Any]:
    """The broker's Redis, without dead letters before and after."""
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        drop_letters(client, None)
        client.delete(AI_QUEUE)
        yield client
        drop_letters(client, None)


@pytest.fixture
def sent(app: Celery, redis: Any) -> bytes:
    """A message as Celery sends it, taken out of its queue again."""
    app.send_task("trueup.expire_holds", queue="for-the-test")
    message = redis.rpop("for-the-test")
    assert isinstance(message, bytes)
    assert find_problem(message) is None
    return message


def changed(message: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(message)
    change(content)
    return json.dumps(content).encode()


def with_body(message: bytes, body: object) -> bytes:
    encoded = base64.b64encode(json.dumps(body).encode()).decode()
    return changed(message, lambda content: content.update(body=encoded))


def with_header(message: bytes, name: str, value: object) -> bytes:
    return changed(message, lambda content: content["headers"].update({name: value}))


def with_property(message: bytes, name: str, value: object) -> bytes:
    return changed(message, lambda content: content["properties"].update({name: value}))


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


POISONS: dict[str, Callable[[bytes], bytes]] = {
    "null": lambda _: b"null",
    "nothing": lambda _: b"",
    "no JSON": lambda _: b"{",
    "no text": lambda _: b"\xff\xfe\x00",
    "a list": lambda _: b"[1]",
    "nested too deep": lambda _: b"[" * 100_000 + b"]" * 100_000,
    "an unknown type of value": lambda message: with_body(message, {"__type__": "nonsense", "__value__": 1}),
    "cut off": lambda message: message[: len(message) // 2],
    "no properties": lambda message: changed(message, lambda content: content.pop("properties")),
    "no delivery tag": lambda message: changed(message, lambda content: content["properties"].pop("delivery_tag")),
    "a tag that is no text": lambda message: with_property(message, "delivery_tag", {"a": 1}),
    "no delivery info": lambda message: with_property(message, "delivery_info", None),
    "an exchange that is no text": lambda message: with_property(message, "delivery_info", {"exchange": []}),
    "an unknown encoding of the body": lambda message: with_property(message, "body_encoding", "nonsense"),
    "headers that are no object": lambda message: changed(message, lambda content: content.update(headers=[1])),
    "no headers": lambda message: changed(message, lambda content: content.update(headers=None)),
    "a body that is no base64": lambda message: changed(message, lambda content: content.update(body="§")),
    "a body of wrong length": lambda message: changed(message, lambda content: content.update(body="abcde")),
    "a body that is no text": lambda message: changed(message, lambda content: content.update(body=7)),
    "the body null": lambda message: with_body(message, None),
    "a body without its parts": lambda message: with_body(message, [[]]),
    "arguments that are no list": lambda message: with_body(message, [7, {}, {}]),
    "another content type": lambda message: changed(message, lambda m: m.update({"content-type": "text/html"})),
    "another content encoding": lambda message: changed(message, lambda m: m.update({"content-encoding": "utf-99"})),
    "an id that is an object": lambda message: with_header(message, "id", {"a": 1}),
    "an id that is null": lambda message: with_header(message, "id", None),
    "a task that is a list": lambda message: with_header(message, "task", ["trueup.expire_holds"]),
    "an unknown task": lambda message: with_header(message, "task", "trueup.no_such_task"),
    "time limits that are text": lambda message: with_header(message, "timelimit", "soon"),
    "a time limit that is text": lambda message: with_header(message, "timelimit", ["soon", None]),
    "one time limit": lambda message: with_header(message, "timelimit", [1]),
    "retries that are text": lambda message: with_header(message, "retries", "often"),
    "an eta that is no time": lambda message: with_header(message, "eta", "tomorrow"),
    "an eta that is a list": lambda message: with_header(message, "eta", [1]),
    "an eta of the year 0": lambda message: with_header(message, "eta", "0000-01-01T00:00:00"),
    "an eta before all times": lambda message: with_header(message, "eta", "0001-01-01T00:00:00+14:00"),
    "an expiry that is an object": lambda message: with_header(message, "expires", {"a": 1}),
    "a root that is an object": lambda message: with_header(message, "root_id", {"a": 1}),
    "stamps that are text": lambda message: with_header(message, "stamps", "s"),
    "an unknown compression": lambda message: with_header(message, "compression", "nonsense"),
}

UNREADABLE = {name: poison for name, poison in POISONS.items() if name != "an unknown task"}
SEED = 20261202


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_worker_can_read_is_found_before_celery_sees_it(name: str, sent: bytes) -> None:
    assert find_problem(UNREADABLE[name](sent))


def test_messages_as_celery_sends_them_are_readable(app: Celery, redis: Any) -> None:
    task = app.tasks["trueup.expire_holds"]
    for number, options in enumerate(
        (
            {},
            {"countdown": 60, "expires": 90},
            {"time_limit": 5, "soft_time_limit": 4.5},
            {"compression": "gzip"},
            {"priority": 6},
            {"headers": {"stamps": {"a": "b"}, "stamped_headers": ["a"]}},
            {"link": task.si(), "link_error": task.si()},
        )
    ):
        queue = f"for-the-test-{number}"
        task.apply_async(queue=queue, **options)
        [key] = redis.keys(f"{queue}*")
        assert find_problem(redis.rpop(key)) is None, options


def _mutations(message: bytes, count: int) -> Iterator[bytes]:
    """Yield messages with random faults: other bytes, parts cut out, values of other kinds at any place."""
    dice = random.Random(SEED)  # noqa: S311 - it guards nothing
    values = [None, True, -1, 2**70, 1.5, "", "x", "\x00", [], [1], {}, {"a": 1}, "2026-01-01", nested(50)]
    for _ in range(count):
        kind = dice.choice(("bytes", "cut", "value", "value", "value", "body"))
        if kind == "bytes":
            changed_bytes = bytearray(message)
            for _ in range(dice.randint(1, 5)):
                changed_bytes[dice.randrange(len(message))] = dice.randrange(256)
            yield bytes(changed_bytes)
        elif kind == "cut":
            start = dice.randrange(len(message))
            yield message[:start] + message[start + dice.randint(1, 30) :]
        elif kind == "body":
            body = [dice.choice(values) for _ in range(dice.randint(0, 4))]
            yield with_body(message, dice.choice([body, *values]))
        else:
            content = json.loads(message)
            place = dice.choice([content, content["headers"], content["properties"]])
            place[dice.choice(sorted(place))] = dice.choice(values)
            yield json.dumps(content).encode()


def test_a_worker_survives_every_message_and_keeps_what_it_cannot_read(
    app: Celery, redis: Any, worker: WorkerProcess, sent: bytes
) -> None:
    poisons = [poison(sent) for poison in POISONS.values()]
    fuzzed = list(_mutations(sent, 300))
    for message in (*poisons, *fuzzed):
        redis.lpush(AI_QUEUE, message)
    wait_for(lambda: redis.llen(AI_QUEUE) == 0, "the queue is empty", seconds=3 * DEADLINE_SECONDS)
    task = app.tasks["trueup.expire_holds"]
    assert task.apply_async(queue=AI_QUEUE).get(timeout=DEADLINE_SECONDS) == {"holds": 0, "tokens": 0}
    assert worker.process.poll() is None
    kept = {base64.b64decode(letter.message) for letter in list_letters(redis)}
    unreadable = [message for message in (*poisons, *fuzzed) if find_problem(message)]
    assert len(unreadable) > 100
    assert [message for message in unreadable if message not in kept] == []
    assert any(letter.task == "trueup.no_such_task" for letter in list_letters(redis))
    assert "kept as a dead letter queue=trueup-ai" in worker.output
    wait_for(lambda: redis.hlen("unacked") == 0, "nothing is left unacknowledged")


def test_answers_of_workers_to_remote_control_are_no_dead_letters(
    app: Celery, redis: Any, worker: WorkerProcess
) -> None:
    wait_for(lambda: app.control.ping(timeout=1), "the worker answers")
    assert list_letters(redis) == []


def test_dead_letters_are_bounded_and_come_back_unchanged(redis: Any) -> None:
    for number in range(MAX_LETTERS + 5):
        keep_letter(redis, "for-the-test", b"%d" % number, "no JSON object")
    letters = list_letters(redis)
    assert (len(letters), letters[0].message) == (MAX_LETTERS, base64.b64encode(b"%d" % (MAX_LETTERS + 4)).decode())
    [requeued] = requeue_letters(redis, [letters[3].id])
    assert requeued == letters[3]
    assert redis.lrange("for-the-test", 0, -1) == [base64.b64decode(requeued.message)]
    assert drop_letters(redis, [letters[0].id, "no such letter"]) == [letters[0]]
    assert len(list_letters(redis)) == MAX_LETTERS - 2
    redis.delete("for-the-test")


def test_a_message_that_is_too_long_is_kept_cut_off_and_not_requeued(redis: Any) -> None:
    letter = keep_letter(redis, "for-the-test", b"x" * 1_000_001, "no JSON object")
    assert (letter.bytes, letter.is_whole) == (1_000_001, False)
    assert len(base64.b64decode(letter.message)) == 1_000_000
    assert requeue_letters(redis, None) == []
    assert isinstance(list_letters(redis)[0], DeadLetter)
