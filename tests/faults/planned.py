"""The planned tasks of a round: their arguments, and how the servers treat them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from tests.faults.kinds import CHUNKS_READ
from tests.faults.prompts import label_of, prompt_of
from trueup.tasks.identity import request_fingerprint

COMPLETE, STREAM, STREAM_CLOSED, STREAM_LEFT = "complete", "stream", "stream_closed", "stream_left"
"""Ways to make a call: at once, in chunks, or in chunks of which the task reads some and then closes or leaves it."""

Style = Literal["plain", "async", "threads"]
SPEND_TASKS: dict[Style, str] = {
    "plain": "faults.spend",
    "async": "faults.spend_async",
    "threads": "faults.spend_in_threads",
}
SEND_TASK = "trueup.send_instagram_dm"

_PRODUCTS = ({"name": "Lamp", "price": "10", "currency": "EUR"},)


@dataclass(frozen=True, kw_only=True)
class PlannedTask(ABC):
    """One task, sent `at` seconds after the round's start.

    `script`: how the provider treats its calls the first time they come; `copies`: how often it is delivered.
    `request`: its number among the requests that share the task id. `after`: it is sent when an earlier request with
    that id has its result.
    """

    task_id: str
    at: float
    user: int
    copies: int
    script: tuple[str, ...]
    request: int = 1
    after: bool = False

    @property
    def label(self) -> str:
        """The name of its request."""
        return label_of(self.task_id, self.request)

    def fingerprint(self, user_id: object) -> str:
        """Return the fingerprint of its request, as the hold keeps it."""
        return request_fingerprint(self.name, self.arguments(user_id), {})

    @property
    @abstractmethod
    def name(self) -> str:
        """The Celery task's name."""

    @abstractmethod
    def arguments(self, user_id: object) -> dict[str, Any]:
        """Return the arguments to send it with."""

    def chunks_read(self, call: int) -> int | None:
        """Return how many chunks of a stream it reads before it ends it. None: all, or it is no stream."""
        return None

    def streams(self, call: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Spending(PlannedTask):
    """A task that calls the model, once in each of these `ways`, with a pause of `seconds` after each call.

    `extends`: it holds less than it needs, and extends its hold before each call that the hold does not cover.
    `style`: a body that makes one call after the other, the same as `async def`, or one with a thread for each call.
    `works`: the seconds that it works after its first call.
    """

    ways: tuple[str, ...]
    words: int
    seconds: float
    tokens: int
    cap: int | None
    extends: bool
    style: Style = "plain"
    works: float = 0.0

    @property
    def name(self) -> str:
        return SPEND_TASKS[self.style]

    def arguments(self, user_id: object) -> dict[str, Any]:
        return {
            "user_id": user_id,
            "label": self.label,
            "tokens": self.tokens,
            "ways": list(self.ways),
            "words": self.words,
            "seconds": self.seconds,
            "cap": self.cap,
            "extends": self.extends,
            "works": self.works,
        }

    def chunks_read(self, call: int) -> int | None:
        return CHUNKS_READ if self._way(call) in (STREAM_CLOSED, STREAM_LEFT) else None

    def streams(self, call: int) -> bool:
        return self._way(call) != COMPLETE

    def _way(self, call: int) -> str:
        return self.ways[call - 1]


@dataclass(frozen=True, kw_only=True)
class Sending(PlannedTask):
    """A task that answers a comment by a direct message. In mode PRODUCT the model writes the message.

    `post_script`: how Instagram treats its message and its public reply the first time they come.
    """

    mode: str
    words: int
    replies: bool
    post_script: tuple[str, str]

    @property
    def name(self) -> str:
        return SEND_TASK

    @property
    def comment_id(self) -> str:
        return self.task_id.replace("-", "_")

    def arguments(self, user_id: object) -> dict[str, Any]:
        comment = {
            "id": self.comment_id,
            "text": prompt_of(self.task_id, 1, user_id, self.words),
            "from": {"id": "4711", "username": "kim"},
        }
        config: dict[str, Any] = {"mode": self.mode}
        if self.mode == "STATIC":
            config["static_message"] = f"Thanks for {self.comment_id}."
        else:
            config["products"] = list(_PRODUCTS)
        if self.replies:
            config |= {"public_reply_enabled": True, "public_reply_text": f"See your messages, {self.comment_id}."}
        return {
            "user_id": user_id,
            "event": {
                "object": "instagram",
                "entry": [{"id": "1001", "changes": [{"field": "comments", "value": comment}]}],
            },
            "config": config,
        }
