"""Dead letters: messages that a worker could not read or had no task for, kept in Redis for a person to look at."""

import base64
import json
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

KEY = "trueup-dead-letters"
# Beyond that the oldest go: a sender that is out of order must not fill Redis.
MAX_LETTERS = 1_000
# A longer message is kept cut off, and can't be requeued.
MAX_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that was taken from a queue and not worked on.

    `message`: its bytes in base64. `bytes`: its full length. `task`, `task_id`: as the message names them; None: it
    can't be read that far.
    """

    id: str
    queue: str
    reason: str
    at: str
    bytes: int
    task: str | None
    task_id: str | None
    message: str

    @property
    def is_whole(self) -> bool:
        return self.bytes <= MAX_BYTES


def keep_letter(client: Any, queue: str, message: bytes, reason: str) -> DeadLetter:
    """Add a message to the dead letters. `client`: Redis' own. Returns the letter."""
    task, task_id = _names_of(message)
    letter = DeadLetter(
        id=uuid.uuid4().hex[:12],
        queue=queue,
        reason=reason,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        bytes=len(message),
        task=task,
        task_id=task_id,
        message=base64.b64encode(message[:MAX_BYTES]).decode(),
    )
    with client.pipeline(transaction=True) as pipe:
        pipe.lpush(KEY, json.dumps(asdict(letter)))
        pipe.ltrim(KEY, 0, MAX_LETTERS - 1)
        pipe.execute()
    return letter


def list_letters(client: Any, *, limit: int = MAX_LETTERS) -> list[DeadLetter]:
    """Return the dead letters, newest first, at most `limit`."""
    return [DeadLetter(**json.loads(letter)) for letter in client.lrange(KEY, 0, limit - 1)]


def count_letters(client: Any) -> int:
    return int(client.llen(KEY))


def drop_letters(client: Any, ids: Collection[str] | None) -> list[DeadLetter]:
    """Delete dead letters. `ids` None: all. Returns the deleted ones."""
    return _take(client, ids, lambda pipe, letter: None)


def requeue_letters(client: Any, ids: Collection[str] | None) -> list[DeadLetter]:
    """Put dead letters back at the end of their queues, unchanged. `ids` None: all that are whole. Returns them.

    Two callers at once may requeue one twice: a task of trueup's that is delivered twice does its work once.
    """

    def put_back(pipe: Any, letter: DeadLetter) -> None:
        pipe.lpush(letter.queue, base64.b64decode(letter.message))

    return _take(client, ids, put_back, only=lambda letter: letter.is_whole)


def _take(
    client: Any,
    ids: Collection[str] | None,
    also: Callable[[Any, DeadLetter], None],
    *,
    only: Callable[[DeadLetter], bool] = lambda letter: True,
) -> list[DeadLetter]:
    taken = []
    for stored in client.lrange(KEY, 0, -1):
        letter = DeadLetter(**json.loads(stored))
        if (ids is None or letter.id in ids) and only(letter):
            with client.pipeline(transaction=True) as pipe:
                also(pipe, letter)
                pipe.lrem(KEY, 1, stored)
                pipe.execute()
            taken.append(letter)
    return taken


def _names_of(message: bytes) -> tuple[str | None, str | None]:
    try:
        headers = json.loads(message)["headers"]
        names = [headers.get(name) for name in ("task", "id")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
    task, task_id = (name if isinstance(name, str) else None for name in names)
    return task, task_id
