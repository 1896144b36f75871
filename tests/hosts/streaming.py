"""A model client for streaming views, whose provider gives one word at a time."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from tests.hosts.people import PROMPT_TOKENS, SHORT, SHORT_WORDS
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Completion, CompletionStream, Message
from trueup.settings.settings import get_settings

# How long the provider takes for a word. A client that leaves after the first word is gone long before the last.
WORD_SECONDS = 0.005


class WordByWord:
    """Each word costs one token. A stream that is closed early costs the words given so far."""

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        return PROMPT_TOKENS

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        return self.stream(messages, max_completion_tokens=max_completion_tokens).completion()

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int) -> CompletionStream:
        words = SHORT_WORDS if messages[0].content == SHORT else max_completion_tokens
        given: list[str] = []

        def chunks() -> Iterator[str]:
            for number in range(words):
                time.sleep(WORD_SECONDS)
                given.append(f"{number} ")
                yield given[-1]

        def finish() -> Completion:
            return Completion(
                text="".join(given),
                prompt_tokens=PROMPT_TOKENS,
                completion_tokens=len(given),
                total_tokens=PROMPT_TOKENS + len(given),
                model_name="words",
                response_time_ms=1,
            )

        return CompletionStream(chunks(), finish)


# The settings are read when the server's process starts.
model = MeteredModel(WordByWord, get_settings())


def two_answers(text: str) -> Callable[[Any], Iterator[str]]:
    def chunks(_: Any) -> Iterator[str]:
        for _ in range(2):
            yield from model.stream([Message(role="user", content=text)], max_completion_tokens=700)

    return chunks


def two_answers_asynchronously(text: str) -> Callable[[Any], AsyncIterator[str]]:
    async def chunks(_: Any) -> AsyncIterator[str]:
        for _ in range(2):
            async for chunk in model.astream([Message(role="user", content=text)], max_completion_tokens=700):
                yield chunk

    return chunks
