"""The model interface of the services: messages in, a completion and its token usage out, whole or in chunks.

Services accept any `Model`. A metered task passes the client of `llm.metering`, which spends from the task's hold.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A provider's answer and its usage. All token figures are counts as the provider bills them."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    model_name: str
    response_time_ms: int
    truncated: bool = False
    """The answer was cut off at `max_completion_tokens`."""
    usage_reported: bool = True
    """False if the provider reported no usage, so the tokens were counted here."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """The tokens by class, such as `cached_input` and `reasoning`; empty: of the prompt and the answer alone."""


class CompletionStream(Iterator[str]):
    """The text of a completion in non-empty chunks, and after its end the `Completion` of the received part.

    A stream ends when it is exhausted, when it breaks (iterating raises `ProviderError`) or when it is closed. It costs
    tokens from the moment it is opened, so the code that opens a stream must end it, best with a `with` block.
    It is not thread-safe.
    """

    def __init__(self, chunks: Iterable[str], finish: Callable[[], Completion]) -> None:
        """`finish` stops the source and returns the completion. It is called once; again only if it raised."""
        self._chunks = filter(None, chunks)
        self._finish = finish
        self._completion: Completion | None = None
        self._exhausted = False

    @property
    def exhausted(self) -> bool:
        """True if the whole answer has arrived; False while the stream runs, and if it broke or was closed early."""
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
        except BaseException:  # a time limit's exception too
            self.close()
            raise

    def close(self) -> None:
        """End the stream and close its connection. A second call does nothing."""
        if self._completion is None:
            self._completion = self._finish()

    def completion(self) -> Completion:
        """Return the received part and its usage. A running stream is closed first."""
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
    """A source of completions. Its requests go through the metered transport, so each is a call of the running hold.

    Both methods raise `HoldError` if the hold does not cover the call.
    """

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Buy one completion of at most `max_completion_tokens` tokens; None: as many as the hold still covers.

        Raises `ProviderError`.
        """
        ...

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Do as `complete`, in chunks. Returns once the answer has begun.

        Raises `ProviderError` if the stream does not begin. There is then no usage, or its usage is unknown if
        `outcome_unknown`. An error raised by iterating never leaves the usage unknown: the stream's completion has it,
        reported or counted.
        """
        ...


class Model(Protocol):
    """The operations that a service may use."""

    def extend(self, tokens: int) -> bool:
        """Add `tokens` to the running task's hold. Returns False if the budget denies it; nothing then changes."""
        ...

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `HoldExhaustedError` if the hold does not cover the prompt, `ProviderError` if the provider fails.
        """
        ...

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Return one completion in chunks, charged to the running task's hold whenever and however it ends.

        `max_completion_tokens` and errors are as in `complete`. Iterating raises `ProviderError` if the stream breaks.
        """
        ...


class AsyncStream(Protocol):
    """A completion's chunks for `async for`. `async with` ends it, however its block ends."""

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def aclose(self) -> None:
        """End the stream and close its connection. A second call does nothing."""
        ...

    async def acompletion(self) -> Completion:
        """Return the received part and its usage. A running stream is closed first."""
        ...


class AsyncModel(Model, Protocol):
    """The model client of an `async def` body: the operations of `Model`, and the same for `await`."""

    async def acomplete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Do as `complete`, without blocking the event loop."""
        ...

    def astream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> AsyncStream:
        """Do as `stream`, for `async for`. The stream is opened, and may raise, when it is first used."""
        ...

    async def aextend(self, tokens: int) -> bool:
        """Do as `extend`, without blocking the event loop."""
        ...
