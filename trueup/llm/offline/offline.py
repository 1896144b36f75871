"""The offline provider. It makes its answers from the prompt's own text, always the same, without network or key."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from trueup.llm.model import Completion, CompletionStream, Message
from trueup.llm.offline.chat import better_prompt, chat_reply, question_answer
from trueup.llm.offline.messages import direct_message, plain_reply
from trueup.llm.offline.products import product_answer
from trueup.llm.offline.qa import qa_answer
from trueup.llm.prompt_fit import longest_fitting
from trueup.llm.prompts import Job, job_of
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter

MODEL_NAME = "trueup-offline-1"

_JOBS: dict[str, Callable[[Sequence[Message], Job], str]] = {
    "qa": qa_answer,
    "products": product_answer,
    "dm": direct_message,
    "reply": chat_reply,
    "question": question_answer,
    "prompt": better_prompt,
}

_CHUNK = re.compile(r"\s*\S+|\s+")


class OfflineProvider:
    """Extractive answers in the formats of `trueup.llm.prompts`, billed by the o200k encoding."""

    def __init__(self) -> None:
        self._counter = offline_counter()

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return exactly the prompt tokens that `complete` bills."""
        return count_prompt_tokens(messages, self._counter)

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        """Answer the job that the prompt's marker names; answer any other prompt with sentences of its own."""
        started = time.monotonic()
        job = job_of(messages)
        answer = _JOBS.get(job.name) if job else None
        text = answer(messages, job) if answer and job else plain_reply(messages)
        kept = _cut(text, max_completion_tokens, self._counter)
        prompt_tokens = self.count_prompt_tokens(messages)
        completion_tokens = self._counter.count(kept)
        return Completion(
            text=kept,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            model_name=MODEL_NAME,
            response_time_ms=round((time.monotonic() - started) * 1000),
            truncated=len(kept) < len(text),
        )

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int) -> CompletionStream:
        """Return the answer of `complete` word by word. A stream that is closed early costs the words given so far."""
        whole = self.complete(messages, max_completion_tokens=max_completion_tokens)
        given: list[str] = []

        def chunks() -> Iterator[str]:
            for word in _CHUNK.findall(whole.text):
                given.append(word)
                yield word

        def finish() -> Completion:
            text = "".join(given)
            if text == whole.text:
                return whole
            tokens = self._counter.count(text)
            return replace(
                whole,
                text=text,
                completion_tokens=tokens,
                total_tokens=whole.prompt_tokens + tokens,
                truncated=False,
                usage_reported=False,
            )

        return CompletionStream(chunks(), finish)


def _cut(text: str, tokens: int, counter: TokenCounter) -> str:
    """Return the longest prefix of the text that costs at most `tokens`."""
    if counter.count(text) <= tokens:
        return text
    return text[: longest_fitting(len(text) - 1, lambda length: counter.count(text[:length]) <= tokens)]
