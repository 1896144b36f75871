"""The model client of metered tasks. It spends only from the running task's hold: the transport charges each call."""

from collections.abc import Callable, Sequence
from functools import cached_property

from trueup.database.retry import once
from trueup.gate.provider_calls import extend_hold
from trueup.llm.awaitable import AwaitableModel, InFlight
from trueup.llm.model import Completion, CompletionStream, Message, Provider
from trueup.llm.running import running_or_refuse


class MeteredModel(AwaitableModel):
    """A `Model` that asks a provider for at most the tokens that the hold covers, and charges the real usage.

    A redelivered task repeats its calls, in any order. Calls already paid for are replayed from their charges.
    `make_provider` is called on first use.
    """

    def __init__(self, make_provider: Callable[[], Provider]) -> None:
        self._make_provider = make_provider

    @cached_property
    def provider(self) -> Provider:
        """The provider, made on first use, because a task that calls no model needs none.

        Raises `SettingsError` as `make_provider` does. A task reads this before it holds tokens, to fail early.
        """
        return self._make_provider()

    @property
    def tokens_left(self) -> int:
        """Tokens that the running task may still spend. Raises `NoHoldError` outside a metered task."""
        return running_or_refuse().tokens_left

    def in_flight(self) -> InFlight:
        """Return the calls in threads of the running hold. Raises `NoHoldError` outside a metered task."""
        return running_or_refuse().in_flight

    def extend(self, tokens: int) -> bool:
        """Add `tokens` to the running task's hold. Returns False if the budget denies it; the hold is then unchanged.

        Raises `NoHoldError` outside a metered task, `HoldOvertakenError` if another attempt has the hold.
        """
        running = running_or_refuse()
        reason, running.tokens_left = once(lambda connection: extend_hold(connection, running.hold, tokens))
        return reason is None

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `NoHoldError` outside a metered task, `HoldExhaustedError` if the hold does not cover the prompt and
        one token of the answer, `HoldOvertakenError` if a later attempt has the hold, `ProviderError` if the provider
        fails, `ServiceUnavailableError` if the database can't record the call intent or the usage.
        """
        running_or_refuse()
        return self.provider.complete(messages, max_completion_tokens=max_completion_tokens)

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Return one completion in chunks, charged when the stream ends, breaks or is closed early.

        `max_completion_tokens` and errors are as in `complete`. Iterating raises `ProviderError` if the stream breaks,
        after the received part was charged.
        """
        running_or_refuse()
        return self.provider.stream(messages, max_completion_tokens=max_completion_tokens)
