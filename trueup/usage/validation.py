"""Checks of what host code reports about a provider call: counts, keys, names and metadata."""

import json
from typing import Any

from trueup.errors import InvalidInputError
from trueup.host.sql import UNCOUNTABLE

_MAX_KEY = 255
# Characters of a model's name that are stored.
MAX_MODEL_NAME = 100


def check_count(value: object, field: str) -> int:
    """Return the count. `field`: the argument's name, for the message.

    Raises `InvalidInputError` if it is not a whole number of 0 or more, or too large for any log.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInputError(f"{field}: {value!r} is not a count. Give a whole number, 0 or more.")
    if value >= UNCOUNTABLE:
        raise too_large(field)
    return value


def too_large(field: str) -> InvalidInputError:
    """Return the error of a figure that the log can't store. `field`: the argument's name."""
    return InvalidInputError(
        f"{field}: the usage log's column can't store so large a figure, so nothing was recorded. Correct "
        "the figure, or make the column a bigint."
    )


def check_counts(prompt_tokens: object, completion_tokens: object, total_tokens: object) -> tuple[int, int, int]:
    """Return prompt, completion and total tokens, checked. Raises `InvalidInputError`.

    `total_tokens` None: the sum of the other two.
    """
    prompt = check_count(prompt_tokens, "prompt_tokens")
    completion = check_count(completion_tokens, "completion_tokens")
    total = prompt + completion if total_tokens is None else total_tokens
    return prompt, completion, check_count(total, "total_tokens")


def check_key(key: object, field: str = "key") -> str:
    """Return the idempotency key, a string of 1 to 255 characters. Raises `InvalidInputError`."""
    if not isinstance(key, str) or not 1 <= len(key) <= _MAX_KEY or storable_text(key) != key:
        raise InvalidInputError(f"{field}: {key!r:.80} is not a key. Give a string of 1 to {_MAX_KEY} characters.")
    return key


def check_name(name: object, field: str) -> str:
    """Return the name, a string with visible characters. Raises `InvalidInputError`."""
    if not isinstance(name, str) or not name.strip() or storable_text(name) != name:
        raise InvalidInputError(f"{field}: {name!r:.80} is not a name. Give a string that is not empty.")
    return name


def check_metadata(metadata: object) -> dict[str, Any]:
    """Return metadata that the log can store as JSON. None gives an empty dict. Raises `InvalidInputError`."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise InvalidInputError(f"metadata: {type(metadata).__name__} is not a dict. Give a dict of JSON values.")
    try:
        content = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        content.encode()
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"metadata: it cannot be stored as JSON ({error}). Give JSON values only.") from None
    if "\\u0000" in content:
        raise InvalidInputError("metadata: it contains NUL characters, which PostgreSQL cannot store. Remove them.")
    return metadata


def storable_text(value: str) -> str:
    """Return the text without NUL and with lone surrogates replaced: PostgreSQL cannot store either."""
    return value.replace("\x00", "").encode(errors="replace").decode()
