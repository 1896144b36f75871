"""What the transport needs to know about a maker's wire format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trueup.llm.formats.usage import TokenUsage
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import TokenCounter

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A client's request in a known format.

    `host`, `path`: in lower case, the path without a trailing slash. `media_tokens`: what images, audio and files in
    the prompt cost together, at most, as the client says; None: it does not say.
    """

    host: str
    path: str
    body: Body
    media_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Count:
    """A request to the provider's own free counter of tokens.

    `ending`: follows the path of the call; an ending with ":" replaces the call's verb. `answer`: the field of
    the answer that has the count.
    """

    ending: str
    body: Body
    answer: str


class AnswerReader(Protocol):
    """Reads an answer, whole or event by event, into its usage."""

    model_name: str | None
    has_begun: bool
    """A part of an answer in this format was received."""
    is_complete: bool
    """The server has marked the end of the answer."""

    def add(self, event: str | None, data: object) -> bool:
        """Read one JSON value: a whole answer, or one event of a stream, whose name is `event`.

        Returns True if the event only answers what the transport added to the request.
        """
        ...

    def end(self) -> None:
        """Note that the body has ended without an error."""
        ...

    @property
    def usage(self) -> TokenUsage | None:
        """The reported usage. None: not reported yet, or not plausible."""
        ...

    @property
    def prompt_tokens(self) -> int | None:
        """The prompt's tokens, if only these were reported yet."""
        ...

    @property
    def texts(self) -> Sequence[str]:
        """The received text of the answer, with reasoning and calls of tools, in parts."""
        ...

    @property
    def events(self) -> int:
        """How many events with text were received. Each has a token at least."""
        ...


class WireFormat(Protocol):
    """A maker's format for one kind of call."""

    name: str

    def model_of(self, sent: Sent) -> str:
        """Return the name of the model that the request asks for; empty if it names none."""
        ...

    def is_stream(self, sent: Sent) -> bool:
        """Return whether the request asks for a stream of events."""
        ...

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        """Return what the call may cost. Raises `UnboundedCallError` if the request does not tell."""
        ...

    def count_request(self, sent: Sent) -> Count | None:
        """Return the request that has the provider count the prompt; None if it offers none."""
        ...

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        """Return the body with answers of at most `limit` tokens; the same object if nothing changes.

        `adds_usage`: a stream is asked for its usage too, where the format has such an option.
        """
        ...

    def adds_usage(self, sent: Sent) -> bool:
        """Return whether a stream must be asked for its usage, because the client did not."""
        ...

    def reader(self, sent: Sent) -> AnswerReader:
        """Return a reader of the answer to this request."""
        ...


class BodyFormat:
    """A format whose requests name the model, and whether they want a stream, in the body."""

    def model_of(self, sent: Sent) -> str:
        model = sent.body.get("model")
        return model if isinstance(model, str) else ""

    def is_stream(self, sent: Sent) -> bool:
        return bool(sent.body.get("stream"))
