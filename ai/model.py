"""What a model is to the services: messages in, a completion and its token usage out.

Services take any `Model`. In a metered task that is the client of `ai.metering`, which spends from the task's hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


class Provider(Protocol):
    """A source of completions. It spends whatever it is asked to: only `ai.metering` may call it."""

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return the tokens the prompt costs, message overhead included; never fewer than billed."""
        ...

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        """Buy one completion of at most `max_completion_tokens` tokens. Raises `ProviderError`."""
        ...


class Model(Protocol):
    """What a service may do with a model."""

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `HoldExhaustedError` when the hold does not cover the prompt, `ProviderError` when the provider fails.
        """
        ...
