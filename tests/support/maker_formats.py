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


class Responses(Answer):
    cap_names = ("max_output_tokens",)

    def response(self, text: str, status: str, reports: bool) -> dict[str, Any]:
        billed = self.billed
        usage = {
            "input_tokens": billed.prompt,
            "input_tokens_details": {"cached_tokens": billed.cached},
            "output_tokens": billed.output + billed.reasoning,
            "output_tokens_details": {"reasoning_tokens": billed.reasoning},
            "total_tokens": billed.total,
        }
        content = {"type": "output_text", "text": text, "annotations": []}
        message = {"type": "message", "id": "m1", "role": "assistant", "status": status, "content": [content]}
        return {
            "id": "r1",
            "object": "response",
            "created_at": 1,
            "model": MODEL,
            "status": status,
            "tools": [],
            "output": [message] if text else [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "usage": usage if reports and status == "completed" else None,
        }

    def whole(self, reports: bool) -> dict[str, Any]:
        return self.response(self.make(self.words), "completed", reports)

    def events(self, reports: bool) -> Iterator[bytes]:
        def named(kind: str, number: int, **more: Any) -> bytes:
            return event({"type": kind, "sequence_number": number, **more}, kind)

        yield named("response.created", 0, response=self.response("", "in_progress", False))
        place = {"item_id": "m1", "output_index": 0, "content_index": 0, "logprobs": []}
        for number in range(self.words):
            delta = {"delta": self.make(1), "obfuscation": "x" * number}
            yield named("response.output_text.delta", number + 1, **delta, **place)
        done = self.response(WORD * self.words, "completed", reports)
        yield named("response.completed", self.words + 1, response=done)


class Embeddings(Answer):
    def whole(self, reports: bool) -> dict[str, Any]:
        given = self.body["input"]
        vectors = [
            {"object": "embedding", "index": index, "embedding": [0.5, 0.25]}
            for index, _ in enumerate(given if isinstance(given, list) else [given])
        ]
        usage = {"usage": {"prompt_tokens": self.billed.prompt, "total_tokens": self.billed.prompt}} if reports else {}
        return {"object": "list", "data": vectors, "model": self.body["model"]} | usage


class Messages(Answer):
    cap_names = ("max_tokens",)

    def usage(self) -> dict[str, Any]:
        billed = self.billed
        written = billed.cached // 2
        return {
            "input_tokens": billed.prompt - billed.cached,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": billed.cached - written,
            "output_tokens": billed.output + billed.reasoning,
            "output_tokens_details": {"thinking_tokens": billed.reasoning},
        }

    def message(self, text: str) -> dict[str, Any]:
        content = [{"type": "text", "text": text}] if text else []
        head = {"id": "m1", "type": "message", "role": "assistant", "model": "claude-test", "content": content}
        return head | {"stop_reason": "end_turn" if text else None, "stop_sequence": None}

    def whole(self, reports: bool) -> dict[str, Any]:
        text = self.make(self.words)
        return self.message(text) | ({"usage": self.usage()} if reports else {"usage": {}})

    def events(self, reports: bool) -> Iterator[bytes]:
        start = self.message("") | {"usage": self.usage() | {"output_tokens": 1}}
        yield event({"type": "message_start", "message": start}, "message_start")
        block = {"type": "text", "text": ""}
        yield event({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start")
        for _ in range(self.words):
            delta = {"type": "text_delta", "text": self.make(1)}
            yield event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
        yield event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        usage = {"output_tokens": self.billed.output + self.billed.reasoning}
        end = {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage if reports else {}}
        yield event({"type": "message_delta"} | end, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")


class Gemini(Answer):
    cap_names = ("maxOutputTokens",)

    def cap_in(self, name: str) -> int | None:
        config: dict[str, int] = self.body.get("generationConfig") or {}
        return config.get(name)

    @property
    def is_stream(self) -> bool:
        return self.path.endswith(":streamGenerateContent")

    def chunk(self, text: str, reports: bool, finish: str | None = None) -> dict[str, Any]:
        billed = self.billed
        candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}
        usage = {
            "promptTokenCount": billed.prompt,
            "cachedContentTokenCount": billed.cached,
            "candidatesTokenCount": billed.output,
            "thoughtsTokenCount": billed.reasoning,
            "totalTokenCount": billed.total,
        }
        chunk = {
            "candidates": [candidate | ({"finishReason": finish} if finish else {})],
            "modelVersion": "gemini-test",
        }
        return chunk | ({"usageMetadata": usage} if reports else {})

    def whole(self, reports: bool) -> dict[str, Any]:
        return self.chunk(self.make(self.words), reports, "STOP")

    def events(self, reports: bool) -> Iterator[bytes]:
        for _ in range(self.words):
            text = self.make(1)
            yield event(self.chunk(text, reports))
        yield event(self.chunk("", reports, "STOP"))


class GeminiEmbeddings(Answer):
    def whole(self, reports: bool) -> dict[str, Any]:
        vectors = [{"values": [0.5, 0.25]} for _ in self.body["requests"]]
        return {"embeddings": vectors} | (
            {"usageMetadata": {"promptTokenCount": self.billed.prompt}} if reports else {}
        )


class Counter(Answer):
    """The makers' own counters of tokens. They bill nothing."""

    def whole(self, reports: bool) -> dict[str, Any]:
        tokens, self.billed.prompt = 500, 0
        self.maker.counted += 1
        name = "totalTokens" if self.path.endswith(":countTokens") else "input_tokens"
        return {name: tokens}


_FORMATS: tuple[tuple[str, type[Answer]], ...] = (
    ("/chat/completions", Chat),
    ("/responses", Responses),
    ("/embeddings", Embeddings),
    ("/messages", Messages),
    (":generateContent", Gemini),
    (":streamGenerateContent", Gemini),
    (":batchEmbedContents", GeminiEmbeddings),
    ("/responses/input_tokens", Counter),
    ("/messages/count_tokens", Counter),
    (":countTokens", Counter),
)


def format_for(path: str) -> type[Answer] | None:
    return next((known for ending, known in _FORMATS if path.endswith(ending)), None)
