"""What a model is to the services: messages in, a completion and its token usage out, at once or in chunks.

Services take any `Model`. In a metered task that is the client of `llm.metering`, which spends from the task's hold.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A provider's answer and what it cost. All token figures are counts as the provider bills them."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    model_name: str
    response_time_ms: int
    truncated: bool = False
    """The answer was cut off at `max_completion_tokens`."""
    usage_reported: bool = True
    """False when the provider named no usage and the tokens were counted here instead."""


class CompletionStream(Iterator[str]):
    """The text of a completion in chunks, none of them empty, and after its end the `Completion` of what arrived.

    A stream ends when it is exhausted, when it breaks (iterating raises `ProviderError`) and when it is closed. It has
    cost tokens in each case, from the moment it exists: whoever opens one must end it, best by a `with` block.
    Not for several threads.
    """

    def __init__(self, chunks: Iterable[str], finish: Callable[[], Completion]) -> None:
        """`finish` stops the source and returns the completion. It is called once, and again only if it raised."""
        self._chunks = filter(None, chunks)
        self._finish = finish
        self._completion: Completion | None = None
        self._exhausted = False

    @property
    def exhausted(self) -> bool:
        """True when the answer has arrived to its end; False while it runs, and if it broke or was closed early."""
        return self._exhausted

    def __next__(self) -> str:
        if self._completion is not None:
            raise StopIteration
        try:
            return next(self._chunks)
        except StopIteration:
            self._exhausted = True
            self.close()
            raise
        except BaseException:  # a time limit's, too
            self.close()
            raise

    def close(self) -> None:
        """End the stream where it stands and let go of its connection. Closing again does nothing."""
        if self._completion is None:
            self._completion = self._finish()

    def completion(self) -> Completion:
        """Return what arrived and what it cost; a stream that still runs is closed first."""
        if self._completion is None:
            self._completion = self._finish()
        return self._completion

    def __enter__(self) -> "CompletionStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Provider(Protocol):
    """A source of completions. It spends whatever it is asked to: only `trueup.llm.metering` may call it."""

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return the tokens the prompt costs, message overhead included; never fewer than billed."""
        ...

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        """Buy one completion of at most `max_completion_tokens` tokens. Raises `ProviderError`."""
        ...

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int) -> CompletionStream:
        """Buy one completion of at most `max_completion_tokens` tokens, in chunks; returns once it has begun.

        Raises `ProviderError` when it does not begin: then there is no usage, or, if `outcome_unknown`, none is known.
        An error raised by iterating leaves no outcome unknown: the stream's completion has the usage, counted if need
        be.
        """
        ...


class Model(Protocol):
    """What a service may do with a model."""

    def extend(self, tokens: int) -> bool:
        """Add `tokens` to the running task's hold; False if the budget does not allow it, and nothing has changed."""
        ...

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `HoldExhaustedError` when the hold does not cover the prompt, `ProviderError` when the provider fails.
        """
        ...

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Return one completion in chunks, charged to the running task's hold when it ends, however it ends.

        `max_completion_tokens` and errors as with `complete`; iterating raises `ProviderError` when the stream breaks.
        """
        ...
