"""The offline server. It makes its answers from the prompt's own text, always the same, without network or key."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2

from trueup.llm.model import Message
from trueup.llm.offline.chat import better_prompt, chat_reply, question_answer
from trueup.llm.offline.messages import direct_message, plain_reply
from trueup.llm.offline.products import product_answer
from trueup.llm.offline.qa import qa_answer
from trueup.llm.prompt_fit import longest_fitting
from trueup.llm.prompts import Job, job_of
from trueup.llm.tokens import OFFLINE_MODEL, TokenCounter, count_prompt_tokens, offline_counter

_JOBS: dict[str, Callable[[Sequence[Message], Job], str]] = {
    "qa": qa_answer,
    "products": product_answer,
    "dm": direct_message,
    "reply": chat_reply,
    "question": question_answer,
    "prompt": better_prompt,
}

_CHUNK = re.compile(r"\s*\S+|\s+")
_DONE = b"data: [DONE]\n\n"


class OfflineServer(httpx2.BaseTransport):
    """Answers requests for chat completions in this process, billed by the o200k encoding.

    Its answers are extracts, in the formats of `trueup.llm.prompts`.
    """

    def __init__(self) -> None:
        self._counter = offline_counter()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.read())
        messages = [Message(role=message["role"], content=message["content"]) for message in asked["messages"]]
        text, is_cut = self.answer(messages, asked["max_tokens"])
        prompt, made = count_prompt_tokens(messages, self._counter), self._counter.count(text)
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        finish = "length" if is_cut else "stop"
        if not asked.get("stream"):
            return httpx2.Response(200, json=_completion(text, finish, usage))
        stream = _Events(_CHUNK.findall(text), finish, usage)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=stream)

    def answer(self, messages: Sequence[Message], max_tokens: int) -> tuple[str, bool]:
        """Answer the job that the prompt's marker names; answer any other prompt with sentences of its own.

        Returns the text, of at most `max_tokens` tokens, and whether it was cut off there.
        """
        job = job_of(messages)
        make = _JOBS.get(job.name) if job else None
        text = make(messages, job) if make and job else plain_reply(messages)
        kept = _cut(text, max_tokens, self._counter)
        return kept, len(kept) < len(text)


class _Events(httpx2.SyncByteStream):
    """An answer word by word, and its usage at the end."""

    def __init__(self, words: Sequence[str], finish: str, usage: dict[str, int]) -> None:
        self._words = words
        self._finish = finish
        self._usage = usage

    def __iter__(self) -> Iterator[bytes]:
        yield _event(_choice(delta={"role": "assistant", "content": ""}))
        for word in self._words:
            yield _event(_choice(delta={"content": word}))
        yield _event(_choice(delta={}, finish_reason=self._finish))
        yield _event({"choices": [], "usage": self._usage}) + _DONE


def _completion(text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"model": OFFLINE_MODEL, "usage": usage} | _choice(message=message, finish_reason=finish)


def _choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **fields}]}


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'model': OFFLINE_MODEL} | data)}\n\n".encode()


def _cut(text: str, tokens: int, counter: TokenCounter) -> str:
    """Return the longest prefix of the text that costs at most `tokens`."""
    if counter.count(text) <= tokens:
        return text
    return text[: longest_fitting(len(text) - 1, lambda length: counter.count(text[:length]) <= tokens)]
