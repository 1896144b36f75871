"""What waits in a queue in Redis: how many messages, and since when."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trueup.tasks.queues import SENT_AT_HEADER

# kombu keeps a queue of each priority beside the plain one.
PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
# Of so many messages at the old end, some may not be due, or have been put back there.
SAMPLE = 20


@dataclass(frozen=True, kw_only=True)
class QueueDepth:
    """Messages in a queue. `oldest_seconds`: for how long the oldest has been due; None: no message says so."""

    length: int
    oldest_seconds: float | None

    def __str__(self) -> str:
        oldest = "" if self.oldest_seconds is None else f", the oldest for {self.oldest_seconds:,.0f} s"
        return f"{self.length:,} tasks wait{oldest}"


def read_queue_depth(client: Any, queue: str) -> QueueDepth:
    """Look at a queue of that name, without taking anything. `client`: Redis' own."""
    seconds, microseconds = client.time()
    now = datetime.fromtimestamp(seconds + microseconds / 1_000_000, UTC)
    length, ages = 0, []
    for priority in PRIORITIES:
        key = f"{queue}{priority}"
        length += int(client.llen(key))
        # New ones are put at the list's left end.
        messages = (_headers_of(message) for message in client.lrange(key, -SAMPLE, -1))
        ages += [(now - since).total_seconds() for message in messages if (since := _due_since(message)) is not None]
    waited = [age for age in ages if age >= 0]
    # Clocks differ a little: what was sent just now may seem to come from the future.
    return QueueDepth(length=length, oldest_seconds=max(waited, default=0.0 if ages else None))


def _headers_of(message: str | bytes) -> dict[str, Any]:
    """Return a message's headers; of one that is no task's, none."""
    try:
        headers = json.loads(message)["headers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return headers if isinstance(headers, dict) else {}


def _due_since(headers: dict[str, Any]) -> datetime | None:
    """Return since when a task could have been taken; None: unknown, as of one that was taken and put back."""
    if headers.get("redelivered"):
        return None
    try:
        moments = [datetime.fromisoformat(told) for told in (headers[SENT_AT_HEADER], headers.get("eta")) if told]
        return max(moment.astimezone(UTC) for moment in moments)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
