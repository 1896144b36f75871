"""The most that a prompt may cost, from the text in its request."""

from dataclasses import dataclass
from typing import Any

from trueup.errors import UnboundedCallError
from trueup.llm.formats.reading import as_text, list_of, object_of
from trueup.llm.formats.wire_format import Sent
from trueup.llm.tokens import TokenCounter, message_overhead, prompt_overhead

# What a model's template puts around a tool's or a schema's JSON.
_PER_TOOL = 16


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """A part of a prompt that has no text to count. `what`: its name, for errors.

    `is_countable`: the provider's own counter knows its tokens. It does not know what the provider's tools will read.
    """

    what: str
    is_countable: bool = True


def bounded_prompt(
    sent: Sent, counter: TokenCounter, messages: list[Any], rest: dict[str, Any], unknown: Unknown | None
) -> int:
    """Return the prompt's tokens, at most.

    `rest`: the other fields of the body that may become part of the prompt, such as tools. `unknown`: a part
    that has no text to count; None: there is none. Raises `UnboundedCallError` if the client does not tell its cost.
    """
    tokens = prompt_overhead(counter) + sum(_message(counter, message) for message in messages)
    for value in rest.values():
        parts = value if isinstance(value, list) else [value]
        tokens += sum(_PER_TOOL + counter.count(as_text(part)) for part in parts)
    if unknown is None:
        return tokens
    if sent.media_tokens is None:
        raise UnboundedCallError(
            f"its prompt has {unknown.what}, whose tokens can't be counted here",
            "Give what such parts of a prompt cost at most: http_client(prompt_tokens=…).",
            unknown.is_countable,
        )
    return tokens + sent.media_tokens


def _message(counter: TokenCounter, message: object) -> int:
    if not isinstance(message, dict):
        return message_overhead(counter) + counter.count(as_text(message))
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [_part_text(part) for part in list_of(content)]
    rest = {name: value for name, value in message.items() if name not in ("role", "content") and value}
    tokens = message_overhead(counter) + counter.count(str(message.get("role") or ""))
    tokens += sum(counter.count(text) for text in texts)
    return tokens + (counter.count(as_text(rest)) if rest else 0)


def _part_text(part: object) -> str:
    """Return the text of a message's part. What has no text is bounded by the client's own figure."""
    if isinstance(part, str):
        return part
    text = object_of(part).get("text")
    return text if isinstance(text, str) else ""


def media_in(messages: list[Any], text_parts: frozenset[str]) -> Unknown | None:
    """Return the first part that is no text, such as an image; None if all parts are texts.

    `text_parts`: the types of the format's parts that are texts.
    """
    for message in messages:
        fields = object_of(message)
        if isinstance(fields.get("audio"), dict):
            return Unknown(what="audio")
        for part in list_of(fields.get("content")):
            kind = object_of(part).get("type")
            if not isinstance(part, str) and kind not in text_parts:
                return Unknown(what=f"a part of type {kind!r:.40}")
    return None
