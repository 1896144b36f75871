"""The fake servers' ledgers: every request, its processing, and whether the whole answer was sent."""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tests.faults.kinds import BREAKING_KINDS
from tests.faults.prompts import label_of

Effect = Literal["instagram_message", "instagram_public_reply"]
EFFECTS: tuple[Effect, Effect] = ("instagram_message", "instagram_public_reply")

# The tokens of text in each chunk of a stream. The last chunk may have fewer.
CHUNK_TOKENS = 2


@dataclass(kw_only=True)
class Serving:
    """One request that the provider served.

    `fingerprint`: the fingerprint in the keys of its call. `asked`: its maximum cost, prompt and answer; `billed`: its
    real cost. `request`: the number of its request among those with its task id. `pid`: the calling process; `run`: the
    run of a body in it; `lane`: the thread of that run, which makes one call after the other. `complete`: the whole
    answer was sent. `chunks_read`: after how many chunks its caller ends the stream; None: never, or it is no stream.
    `tokens_sent`: of a stream's text. Times are of the monotonic clock.
    """

    serial: int
    task_id: str
    call: int
    fingerprint: str
    user_id: int
    pid: int
    behaviour: str
    asked: int
    started_at: float
    request: int = 1
    run: int = 0
    lane: int = 0
    prompt_tokens: int = 0
    streamed: bool = False
    chunks_read: int | None = None
    tokens_sent: int = 0
    usage_sent: bool = False
    billed: int = 0
    complete: bool = False
    ended_at: float | None = None

    @property
    def model_name(self) -> str:
        """The answer's model name. Charges and log rows keep it, and so name the serving that they record."""
        return f"fake-{self.serial}"

    @property
    def label(self) -> str:
        """The name of its request."""
        return label_of(self.task_id, self.request)

    @property
    def over(self) -> int:
        """The tokens billed beyond the request."""
        return max(0, self.billed - self.asked)

    @property
    def closed_early(self) -> bool:
        """Whether the caller ended the stream, or would have if it had not broken at that very place."""
        return self.chunks_read is not None and self.tokens_sent > (self.chunks_read - 1) * CHUNK_TOKENS

    @property
    def answered(self) -> bool:
        """Whether a living caller received an answer to charge: a whole one, or the beginning of a stream."""
        begun = self.closed_early or self.behaviour in (*BREAKING_KINDS, "stream_usage_lost")
        return self.complete or (self.streamed and begun)

    @property
    def usage_seen(self) -> bool:
        """Whether the caller received the call's usage. Otherwise it counts the text that it got."""
        return self.usage_sent and not self.closed_early

    @property
    def chargeable(self) -> int:
        """The tokens that the caller must charge: the bill, or without it the prompt and the text that it read.

        The provider also bills text that it generated and the caller never saw.
        """
        if self.usage_seen or not self.streamed:
            return self.billed
        read = self.tokens_sent
        if self.chunks_read is not None:
            read = min(read, self.chunks_read * CHUNK_TOKENS)
        return self.prompt_tokens + read


class Ledger:
    """All servings of a round. The provider's threads write them, the round reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servings: list[Serving] = []
        self._times: Counter[tuple[str, int, int]] = Counter()

    def open(
        self,
        *,
        task_id: str,
        call: int,
        fingerprint: str,
        user_id: int,
        pid: int,
        asked: int,
        request: int = 1,
        run: int = 0,
        lane: int = 0,
    ) -> tuple[Serving, int]:
        """Record a request. Returns it, and how often its call has come before."""
        with self._lock:
            times = self._times[task_id, request, call]
            self._times[task_id, request, call] += 1
            serving = Serving(
                serial=len(self._servings) + 1,
                task_id=task_id,
                call=call,
                fingerprint=fingerprint,
                user_id=user_id,
                pid=pid,
                behaviour="ok",
                asked=asked,
                request=request,
                run=run,
                lane=lane,
                started_at=time.monotonic(),
            )
            self._servings.append(serving)
            return serving, times

    def servings(self) -> list[Serving]:
        with self._lock:
            return list(self._servings)

    def in_flight(self) -> list[Serving]:
        """Return the requests that wait for their answers now, oldest first."""
        return [serving for serving in self.servings() if serving.ended_at is None]


@dataclass(kw_only=True)
class Posting:
    """One request to Instagram, to send a message or to reply in public. `accepted`: Instagram accepted it."""

    effect: Effect
    comment_id: str
    text: str
    pid: int
    behaviour: str = "ok"
    accepted: bool = False
    ended_at: float | None = None


class GraphLedger:
    """All postings of a round. Instagram's threads write them, the round reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._postings: list[Posting] = []

    def open(self, *, effect: Effect, comment_id: str, text: str, pid: int) -> tuple[Posting, int]:
        """Record a request. Returns it, and how often the same request has come before."""
        with self._lock:
            times = sum((p.effect, p.comment_id) == (effect, comment_id) for p in self._postings)
            posting = Posting(effect=effect, comment_id=comment_id, text=text, pid=pid)
            self._postings.append(posting)
            return posting, times

    def postings(self) -> list[Posting]:
        with self._lock:
            return list(self._postings)

    def in_flight(self) -> list[Posting]:
        return [posting for posting in self.postings() if posting.ended_at is None]
