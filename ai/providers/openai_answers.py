"""Reading a chat completion's JSON without trusting it: servers that imitate OpenAI differ in every field."""

from dataclasses import dataclass
from typing import Any, TypeGuard

from ai.texts import without_lone_surrogates

_MAX_TOKENS = 2**31 - 1

Usage = tuple[int, int, int]
"""Prompt, completion and total tokens."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a completion's body says. `usage` None: not named, or not believable. `model_name` None: not named."""

    text: str
    truncated: bool
    usage: Usage | None
    model_name: str | None


def read_answer(body: dict[str, Any]) -> Answer:
    """Read a completion. No choice, a refusal or null content is an answer with an empty text, never an error."""
    choice = _first_object(body.get("choices"))
    message = choice.get("message")
    content = _content(message.get("content") if isinstance(message, dict) else choice.get("text"))
    text = without_lone_surrogates(content)  # PostgreSQL, where answers are kept, refuses them
    model = body.get("model")
    return Answer(
        text=text,
        truncated=choice.get("finish_reason") == "length",
        usage=_usage(body.get("usage"), answered=bool(text)),
        model_name=model if isinstance(model, str) and model else None,
    )


def _first_object(choices: object) -> dict[str, Any]:
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return {}


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # content parts
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return ""


def _usage(usage: object, *, answered: bool) -> Usage | None:
    """Return believable usage. A prompt always costs tokens and so does a text: zeros there are no usage."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not _is_count(prompt) or not _is_count(completion):
        return None
    if prompt == 0 or (answered and completion == 0):
        return None
    total = usage.get("total_tokens", prompt + completion)
    if not _is_count(total):
        return None
    # More than the sum is billed reasoning that some servers list nowhere else; less is a mistake.
    total = max(total, prompt + completion)
    return (prompt, completion, total) if total <= _MAX_TOKENS else None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS
