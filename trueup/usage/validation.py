"""What host code says of a provider call, checked where it comes in: counts, keys, names, metadata."""

import json
from typing import Any

from trueup.errors import InvalidInputError
from trueup.usage.charges import MAX_LOG_TOKENS

_MAX_KEY = 255


def check_count(value: object, field: str) -> int:
    """Return a count, brought within what the log can hold. Raises `InvalidInputError` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInputError(f"{field}: {value!r} is no count: give a whole number, 0 or more")
    return min(value, MAX_LOG_TOKENS)


def check_counts(prompt_tokens: object, completion_tokens: object, total_tokens: object) -> tuple[int, int, int]:
    """Return the three counts of tokens; a total of None is the sum of the other two. Raises `InvalidInputError`."""
    prompt = check_count(prompt_tokens, "prompt_tokens")
    completion = check_count(completion_tokens, "completion_tokens")
    total = prompt + completion if total_tokens is None else total_tokens
    return prompt, completion, check_count(total, "total_tokens")


def check_key(key: object, field: str = "key") -> str:
    """Return a key: 1 to 255 characters of text. Raises `InvalidInputError`."""
    if not isinstance(key, str) or not 1 <= len(key) <= _MAX_KEY or storable_text(key) != key:
        raise InvalidInputError(f"{field}: {key!r:.80} is no key: give 1 to {_MAX_KEY} characters of text")
    return key


def check_name(name: object, field: str) -> str:
    """Return a name that people can read. Raises `InvalidInputError`."""
    if not isinstance(name, str) or not name.strip() or storable_text(name) != name:
        raise InvalidInputError(f"{field}: {name!r:.80} is no name: give a text that is not empty")
    return name


def check_metadata(metadata: object) -> dict[str, Any]:
    """Return metadata that the log can hold as JSON; None is none. Raises `InvalidInputError`."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise InvalidInputError(f"metadata: {type(metadata).__name__} is no dict")
    try:
        content = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        content.encode()
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"metadata: can't be kept as JSON ({error})") from None
    if "\\u0000" in content:
        raise InvalidInputError("metadata: can't be kept as JSON (it holds NUL characters)")
    return metadata


def storable_text(value: str) -> str:
    """Return the text without what PostgreSQL's can't hold: NUL, and halves of surrogate pairs."""
    return value.replace("\x00", "").encode(errors="replace").decode()
