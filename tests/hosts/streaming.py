"""A model client for streaming views, whose server gives one word at a time."""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2

from tests.hosts.people import PROMPT_TOKENS, SHORT, SHORT_WORDS
from tests.support.answering import provider_over
from tests.support.wire import DONE, chunk, usage_chunk
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message

# How long the server takes for a word. A client that leaves after the first word is gone long before the last.
WORD_SECONDS = 0.005


class WordByWord(httpx2.BaseTransport):
    """Each word costs one token."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.read())
        words = SHORT_WORDS if asked["messages"][0]["content"] == SHORT else asked["max_tokens"]
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=_Words(words))


class _Words(httpx2.SyncByteStream):
    def __init__(self, words: int) -> None:
        self._words = words

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(self._words):
            time.sleep(WORD_SECONDS)
            yield chunk(" token")
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": self._words}
        yield chunk(finish="stop") + usage_chunk(usage) + DONE


model = MeteredModel(lambda: provider_over(WordByWord()))


def two_answers(text: str) -> Callable[[Any], Iterator[str]]:
    def chunks(_: Any) -> Iterator[str]:
        for _ in range(2):
            yield from model.stream([Message(role="user", content=text)], max_completion_tokens=700)

    return chunks


def two_answers_asynchronously(text: str) -> Callable[[Any], AsyncIterator[str]]:
    async def chunks(_: Any) -> AsyncIterator[str]:
        for _ in range(2):
            async for word in model.astream([Message(role="user", content=text)], max_completion_tokens=700):
                yield word

    return chunks
