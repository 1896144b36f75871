"""The answers of the tests' maker server: one class for each wire format."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from tests.support.makers import MODEL, WORD, Billed, Maker


class Answer:
    """One answer. `whole` and `events` write in the ledger what they make."""

    cap_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, maker: Maker, body: dict[str, Any], billed: Billed, path: str) -> None:
        self.maker, self.body, self.billed, self.path = maker, body, billed, path
        caps = [cap for name in self.cap_names if (cap := self.cap_in(name)) is not None]
        self.words = min(maker.length, max(0, max(caps) - maker.reasoning)) if caps else 100_000

    def cap_in(self, name: str) -> int | None:
        return self.body.get(name)

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    def make(self, words: int) -> str:
        """Make words and bill them. Reasoning is billed with the first."""
        self.billed.reasoning = self.maker.reasoning
        self.billed.output += words
        return WORD * words

    def whole(self, reports: bool) -> dict[str, Any]:
        raise NotImplementedError

    def events(self, reports: bool) -> Iterator[bytes]:
        raise NotImplementedError


def event(data: object, name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


class Chat(Answer):
    cap_names = ("max_completion_tokens", "max_tokens")

    def usage(self) -> dict[str, Any]:
        billed = self.billed
        return {
            "prompt_tokens": billed.prompt,
            "completion_tokens": billed.output + billed.reasoning,
            "total_tokens": billed.total,
            "prompt_tokens_details": {"cached_tokens": billed.cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": billed.reasoning, "audio_tokens": 0},
        }

    def whole(self, reports: bool) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self.make(self.words), "refusal": None},
                "finish_reason": "stop",
            }
            for index in range(self.body.get("n") or 1)
        ]
        usage = {"usage": self.usage()} if reports else {}
        return {"id": "c1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": choices} | usage

    def events(self, reports: bool) -> Iterator[bytes]:
        asked = bool((self.body.get("stream_options") or {}).get("include_usage"))
        base = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        more = {"usage": None} if asked else {}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
            return event(base | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more)

        yield chunk({"role": "assistant", "content": ""})
        for _ in range(self.words):
            yield chunk({"content": self.make(1)})
        yield chunk({}, "stop")
        if asked and reports:
            yield event(base | {"choices": [], "usage": self.usage()})
        yield event("[DONE]")


_FORMATS: tuple[tuple[str, type[Answer]], ...] = (("/chat/completions", Chat),)


def format_for(path: str) -> type[Answer] | None:
    return next((known for ending, known in _FORMATS if path.endswith(ending)), None)
