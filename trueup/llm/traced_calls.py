"""A model call as OpenTelemetry's conventions for generative AI describe it: a span, its duration and its tokens."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

from trueup.telemetry import Histogram, Span, Value
from trueup.usage.charges import Usage

# The conventions give the bounds of the buckets.
_TOKENS = Histogram(
    "gen_ai.client.token.usage", "{token}", "Tokens of prompts and answers.", [4**power for power in range(14)]
)
_SECONDS = Histogram(
    "gen_ai.client.operation.duration", "s", "Duration of model calls.", [0.01 * 2**power for power in range(14)]
)

# Names of providers by the end of their host.
_PROVIDERS = {
    "openai.azure.com": "azure.ai.openai",
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "amazonaws.com": "aws.bedrock",
    "offline.invalid": "offline",
    "api.cohere.com": "cohere",
    "api.deepseek.com": "deepseek",
    "api.groq.com": "groq",
    "api.mistral.ai": "mistral_ai",
    "api.perplexity.ai": "perplexity",
    "api.x.ai": "x_ai",
}
# Of other hosts: the maker whose API they speak.
_MAKERS = {"openai": "openai", "anthropic": "anthropic", "gemini": "gcp.gemini"}
# By the second word of a wire format's name. All others are chats.
_OPERATIONS = {"embeddings": "embeddings", "embedContent": "embeddings", "generateContent": "generate_content"}
# The attributes of a charge's classes.
_CLASSES = {
    "cached_input": "gen_ai.usage.cache_read.input_tokens",
    "cache_write": "gen_ai.usage.cache_write.input_tokens",
    "reasoning": "gen_ai.usage.reasoning.output_tokens",
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is asked of whom, in the conventions' names."""

    name: str
    provider: str
    model: str

    @classmethod
    def of_request(cls, format_name: str, host: str, model: str) -> "Operation":
        """Return the operation of a request in a wire format, such as "openai chat"."""
        maker, _, kind = format_name.partition(" ")
        found = (name for end, name in _PROVIDERS.items() if host == end or host.endswith((f".{end}", f"-{end}")))
        return cls(name=_OPERATIONS.get(kind, "chat"), provider=next(found, _MAKERS.get(maker, maker)), model=model)

    def attributes(self) -> dict[str, Value]:
        return {
            "gen_ai.operation.name": self.name,
            "gen_ai.provider.name": self.provider,
            "gen_ai.request.model": self.model,
        }


class TracedCall:
    """The span of a call, from its admission to its end."""

    def __init__(self, operation: Operation, task_id: str, feature_name: str) -> None:
        self._attributes = operation.attributes()
        self._started = time.monotonic()
        more: dict[str, Value] = {"trueup.task_id": task_id, "trueup.feature": feature_name}
        self._span = Span(f"{operation.name} {operation.model}", self._attributes | more, is_client=True)

    def current(self) -> AbstractContextManager[object]:
        """Return a block in which new spans are children of the call's."""
        return self._span.current()

    def replayed(self) -> None:
        """Note that the call was answered from its charge. It is in no metric, because no provider was asked."""
        self._span.set({"trueup.replayed": True})
        self._span.end()

    def charged(self, usage: Usage, *, is_new: bool) -> None:
        """Note the usage. `is_new` False: an earlier delivery has recorded it, so it is in the metrics."""
        answered = self._attributes | {"gen_ai.response.model": usage.model_name}
        counts = {"input": usage.prompt_tokens, "output": usage.completion_tokens}
        classes = usage.classes or {}
        found: dict[str, Value] = {f"gen_ai.usage.{kind}_tokens": count for kind, count in counts.items()}
        found |= {attribute: classes[name] for name, attribute in _CLASSES.items() if name in classes}
        self._span.set({"gen_ai.response.model": usage.model_name, **found})
        self._span.end()
        if is_new:
            for kind, count in counts.items():
                _TOKENS.record(count, answered | {"gen_ai.token.type": kind})
            _SECONDS.record(usage.response_time_ms / 1000, answered)

    def failed(self, error_type: str) -> None:
        """Note a call without usage. `error_type`: the error's name, in few variants."""
        self._span.end(error_type)
        _SECONDS.record(time.monotonic() - self._started, self._attributes | {"error.type": error_type})

    def gave_up(self, error_type: str) -> None:
        """Note a call that was not sent, or whose usage is not recorded yet: it is in no metric."""
        self._span.end(error_type)
