"""The usage of a provider call by class. The classes are disjoint: together they are the call's tokens."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class TokenUsage:
    """Counts of tokens, as the provider bills them.

    `input`: read by the model anew, without what a cache gave (`cached_input`) or stored (`cache_write`). `output`:
    the answer without `reasoning`. `audio`: of prompt and answer together. `other`: what a total has beyond its parts.
    """

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    audio: int = 0
    other: int = 0
    prompt: int
    """All tokens of the prompt."""

    @property
    def total(self) -> int:
        return sum(self.classes().values())

    @property
    def completion(self) -> int:
        """All tokens of the answer."""
        return self.total - self.prompt

    def classes(self) -> dict[str, int]:
        """Return the count of each class by its name."""
        return {name: getattr(self, name) for name in CLASSES}

    def at_least(self, total: int | None) -> "TokenUsage":
        """Return the usage with the provider's own total, if that is larger than the sum of the classes."""
        more = (total or 0) - self.total
        return replace(self, other=self.other + more) if more > 0 else self


CLASSES = tuple(field.name for field in fields(TokenUsage) if field.name != "prompt")
"""The names of the classes."""


def split_usage(
    *,
    prompt: int,
    completion: int,
    cached_input: int = 0,
    cache_write: int = 0,
    reasoning: int = 0,
    input_audio: int = 0,
    output_audio: int = 0,
) -> TokenUsage:
    """Return the usage of a prompt and an answer, whose counts contain those of the parts.

    A part that is larger than the rest of its whole is lowered to it.
    """
    left = prompt
    cached_input = min(cached_input, left)
    left -= cached_input
    cache_write = min(cache_write, left)
    left -= cache_write
    input_audio = min(input_audio, left)
    reasoning = min(reasoning, completion)
    output_audio = min(output_audio, completion - reasoning)
    return TokenUsage(
        prompt=prompt,
        input=left - input_audio,
        cached_input=cached_input,
        cache_write=cache_write,
        output=completion - reasoning - output_audio,
        reasoning=reasoning,
        audio=input_audio + output_audio,
    )
