"""The readers' classes of tokens, compared with an independent library that knows the makers' formats."""

from typing import Any

import pytest
from genai_prices import data_snapshot

from trueup.llm.formats.anthropic_messages import MessagesReader
from trueup.llm.formats.gemini import GeminiReader
from trueup.llm.formats.openai_chat import ChatReader
from trueup.llm.formats.openai_embeddings import EmbeddingsReader
from trueup.llm.formats.openai_responses import ResponsesReader
from trueup.llm.formats.usage import TokenUsage

CHAT = {
    "model": "gpt-5",
    "choices": [{"message": {"content": "text"}}],
    "usage": {
        "prompt_tokens": 1_000,
        "completion_tokens": 300,
        "total_tokens": 1_300,
        "prompt_tokens_details": {"cached_tokens": 640, "audio_tokens": 50},
        "completion_tokens_details": {"reasoning_tokens": 128, "audio_tokens": 20},
    },
}
RESPONSE = {
    "model": "gpt-5",
    "output": [],
    "usage": {
        "input_tokens": 1_000,
        "input_tokens_details": {"cached_tokens": 640},
        "output_tokens": 300,
        "output_tokens_details": {"reasoning_tokens": 128},
        "total_tokens": 1_300,
    },
}
MESSAGE = {
    "type": "message",
    "model": "claude-sonnet-4-5",
    "content": [{"type": "text", "text": "text"}],
    "usage": {
        "input_tokens": 100,
        "cache_creation_input_tokens": 200,
        "cache_read_input_tokens": 700,
        "output_tokens": 300,
    },
}
CONTENT = {
    "modelVersion": "gemini-2.5-flash",
    "candidates": [{"content": {"parts": [{"text": "text"}]}, "finishReason": "STOP"}],
    "usageMetadata": {
        "promptTokenCount": 1_000,
        "cachedContentTokenCount": 640,
        "candidatesTokenCount": 172,
        "thoughtsTokenCount": 128,
        "totalTokenCount": 1_300,
    },
}
EMBEDDINGS = {
    "model": "text-embedding-3-small",
    "data": [{"embedding": [1.0]}],
    "usage": {"prompt_tokens": 1_000, "total_tokens": 1_000},
}
CASES: dict[str, tuple[str, str, Any, Any]] = {
    "chat": ("openai", "chat", ChatReader, CHAT),
    "responses": ("openai", "responses", ResponsesReader, RESPONSE),
    "embeddings": ("openai", "embeddings", EmbeddingsReader, EMBEDDINGS),
    "messages": ("anthropic", "default", MessagesReader, MESSAGE),
    "content": ("google", "default", lambda: GeminiReader(is_stream=False), CONTENT),
}


def read(reader: Any, body: dict[str, Any]) -> TokenUsage:
    reader.add(None, body)
    usage: TokenUsage | None = reader.usage
    assert usage is not None
    return usage


@pytest.mark.parametrize("name", CASES)
def test_the_classes_agree_with_another_reader_of_the_same_answers(name: str) -> None:
    provider_id, flavor, reader, body = CASES[name]
    provider = next(one for one in data_snapshot.get_snapshot().providers if one.id == provider_id)
    _, theirs = provider.extract_usage(body, api_flavor=flavor)
    ours = read(reader(), body)
    assert ours.prompt == theirs.input_tokens
    assert ours.completion == (theirs.output_tokens or 0)
    assert ours.cached_input == (theirs.cache_read_tokens or 0)
    assert ours.cache_write == (theirs.cache_write_tokens or 0)
    assert ours.total == ours.prompt + ours.completion
    assert min(ours.classes().values()) >= 0


def test_parts_larger_than_their_whole_are_lowered() -> None:
    usage = CHAT["usage"] | {"prompt_tokens_details": {"cached_tokens": 5_000, "audio_tokens": 3}}  # type: ignore[operator]
    ours = read(ChatReader(), CHAT | {"usage": usage})
    assert (ours.cached_input, ours.audio, ours.input) == (1_000, 20, 0)
    assert ours.total == 1_300
