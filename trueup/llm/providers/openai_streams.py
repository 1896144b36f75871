"""Reading a streamed completion: its text as it arrives, and all that its charge needs."""

import json
import time
from collections.abc import Iterator

import openai

from trueup.llm.providers.openai_answers import Answer, is_completion
from trueup.llm.providers.openai_errors import SDK_ERRORS, Failures

# What reading a stream raises beside the SDK's errors: events that are no UTF-8 or no JSON, or JSON without end.
_UNREADABLE = (ValueError, RecursionError)


class StreamReader:
    """Reads the events of one stream into an answer."""

    def __init__(self, events: openai.Stream[object], failures: Failures) -> None:
        self.answer = Answer()
        self.last_arrival = time.monotonic()
        self._events = events
        self._failures = failures

    def chunks(self) -> Iterator[str]:
        """Yield the text that each event adds, at times an empty one. Raises `ProviderError` if the answer breaks off.

        A stream may break after its answer has ended, while its usage is still to come: that is no error.
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
        if "json" in media_type or "html" in media_type:  # no stream at all: a completion at once, or a stray page
            response.read()
            yield completion_body(response.text, self._failures)
        else:
            yield from self._events


def completion_body(text: str, failures: Failures) -> dict[str, object]:
    """Return the completion that the body of a success holds. Raises `ProviderError` when it is none."""
    try:
        body: object = json.loads(text)
    except _UNREADABLE:
        body = None
    if is_completion(body):
        return body
    raise failures.no_completion(text)
