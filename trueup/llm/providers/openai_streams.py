"""Read a streamed completion: its text as it arrives, and the data that its charge needs."""

import json
import time
from collections.abc import Iterator

import httpx2
import openai

from trueup.llm.providers.failures import Failures
from trueup.llm.providers.openai_answers import Answer, is_completion

SDK_ERRORS = (openai.OpenAIError, httpx2.HTTPError)
"""The SDK's errors. While it reads the body of a refusal, its HTTP client's own errors get through."""

# Errors of reading a stream besides the SDK's: events that are not UTF-8 or JSON, or JSON that is nested too deep.
_UNREADABLE = (ValueError, RecursionError)


class StreamReader:
    """Reads the events of one stream into an answer."""

    def __init__(self, events: openai.Stream[object], failures: Failures) -> None:
        self.answer = Answer()
        self.last_arrival = time.monotonic()
        self._events = events
        self._failures = failures

    def chunks(self) -> Iterator[str]:
        """Yield the text of each event, which may be empty. Raises `ProviderError` if the answer breaks off.

        A break after the end of the answer, before its usage, is not an error.
        """
        broken: Exception | None = None
        try:
            for event in self._read():
                if is_completion(event):
                    self.last_arrival = time.monotonic()
                    yield self.answer.add(event)
        except (*SDK_ERRORS, *_UNREADABLE) as error:
            broken = error
        if not self.answer.finished:
            raise self._failures.broken_stream(broken, begun=self.answer.begun)

    def close(self) -> None:
        self._events.close()

    def _read(self) -> Iterator[object]:
        response = self._events.response
        media_type = response.headers.get("content-type", "").lower()
        if "json" in media_type or "html" in media_type:  # not a stream: a whole completion, or some other page
            response.read()
            yield completion_body(response.text, self._failures)
        else:
            yield from self._events


def completion_body(text: str, failures: Failures) -> dict[str, object]:
    """Return the completion in the body of a success. Raises `ProviderError` if the body is not a completion."""
    try:
        body: object = json.loads(text)
    except _UNREADABLE:
        body = None
    if is_completion(body):
        return body
    raise failures.no_completion(text)
