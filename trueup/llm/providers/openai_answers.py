"""Read a chat completion's JSON without trusting it: OpenAI-compatible servers differ in every field."""

from typing import Any, TypeGuard

_MAX_TOKENS = 2**31 - 1
_HIGH_SURROGATES = ("\ud800", "\udbff")

Usage = tuple[int, int, int]
"""Prompt, completion and total tokens."""


class Answer:
    """The received part of a completion, from one body or from the chunks of a stream."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._half = ""
        self.reasoning = ""
        """Text that is billed as completion but is not part of the answer."""
        self.begun = False
        self.finished = False
        """The server has marked the end of the answer."""
        self.truncated = False
        self.model_name: str | None = None
        """None: not reported."""
        self.usage: Usage | None = None
        """None: not reported, not plausible, or reported before the last text arrived."""

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, body: object) -> str:
        """Add a body or chunk, and return its text.

        A missing choice, a refusal or null content adds an empty text and is never an error. JSON that is not part of a
        completion is ignored.
        """
        if not is_completion(body):
            return ""
        self.begun = True
        choice = _first_object(body.get("choices"))
        self._notice_end(body, choice)
        message = _object(choice.get("delta")) or _object(choice.get("message"))
        added = self._joined(_content(message.get("content") if message else choice.get("text")))
        reasoning = _content(message.get("reasoning_content") or message.get("reasoning"))
        if added or reasoning:
            self._parts.append(added)
            self.reasoning += reasoning
            self.usage = None
        self.usage = _usage(body.get("usage"), answered=any(self._parts)) or self.usage
        return added

    def _notice_end(self, body: dict[str, Any], choice: dict[str, Any]) -> None:
        reason, model = choice.get("finish_reason"), body.get("model")
        # A message instead of a delta is the whole answer. A chunk with usage but no choice, after a text, is the last
        # one of a stream, even if the server reports no finish reason.
        self.finished |= bool(reason) or isinstance(choice.get("message"), dict)
        self.finished |= not choice and any(self._parts) and _usage(body.get("usage"), answered=True) is not None
        self.truncated |= reason == "length"
        if isinstance(model, str) and model:
            self.model_name = model

    def _joined(self, content: str) -> str:
        """Return the content with surrogate pairs joined, across chunks too, and lone surrogates replaced.

        A lone surrogate has no UTF-8 form, so PostgreSQL could not store the answer.
        """
        content, self._half = self._half + content, ""
        if not self.finished and content and _HIGH_SURROGATES[0] <= content[-1] <= _HIGH_SURROGATES[1]:
            content, self._half = content[:-1], content[-1]
        return content.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_completion(body: object) -> TypeGuard[dict[str, Any]]:
    """Return whether the JSON value is a completion or a chunk of one."""
    return isinstance(body, dict) and ("choices" in body or "usage" in body)


def _first_object(choices: object) -> dict[str, Any]:
    return _object(choices[0]) if isinstance(choices, list) and choices else {}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # content parts
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return ""


def _usage(usage: object, *, answered: bool) -> Usage | None:
    """Return plausible usage; None otherwise. A prompt and a text always cost tokens, so zeros are not plausible."""
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    completion = _count(usage, "completion_tokens", "output_tokens", otherwise=0)
    if prompt is None or completion is None or prompt == 0 or (answered and completion == 0):
        return None
    total = _count(usage, "total_tokens", otherwise=prompt + completion)
    if total is None:
        return None
    # A total above the sum includes billed reasoning, which some servers report nowhere else; one below is an error.
    total = max(total, prompt + completion)
    return (prompt, completion, total) if total <= _MAX_TOKENS else None


def _count(usage: dict[str, Any], *names: str, otherwise: int | None = None) -> int | None:
    """Return the first of these figures that is reported; `otherwise` if none is. None: it is no plausible count.

    Some servers name the figures after input and output, and some write whole numbers as floats.
    """
    value = next((usage[name] for name in names if usage.get(name) is not None), otherwise)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_TOKENS:
        return None
    return value
