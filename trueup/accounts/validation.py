"""Validation of token counts, and of the texts that the audit trail keeps."""

import re
from typing import Any

from trueup.errors import InvalidInputError

MAX_TOKENS = 2**63 - 1
# A reference is part of an index row, which holds at most 2,700 bytes.
MAX_CHARACTERS = 500
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def check_estimate(estimated_tokens: Any, field: str = "estimated_tokens", *, least: int = 0) -> int:
    """Return the count of tokens. Raises `InvalidInputError`, a ValueError, if it is no integer of at least `least`."""
    if isinstance(estimated_tokens, bool) or not isinstance(estimated_tokens, int):
        raise InvalidInputError(f"{field}: {estimated_tokens!r} is no whole number of tokens.")
    if not least <= estimated_tokens <= MAX_TOKENS:
        raise InvalidInputError(f"{field}: {estimated_tokens} is out of range. Give {least} to {MAX_TOKENS}.")
    return estimated_tokens


def check_text(field: str, value: str, *, most: int = MAX_CHARACTERS) -> str:
    """Return the text without surrounding spaces.

    `most`: the longest text allowed, in characters. Raises `InvalidInputError` for an empty, too long or malformed one,
    and for control characters: a terminal would obey them, and a log line would break.
    """
    text = value.strip()
    if not text or len(text) > most or _UNPRINTABLE.search(value):
        raise InvalidInputError(
            f"{field}: {text[:50]!r} can't be stored. Give a text of 1 to {most} characters in one line, without "
            "control characters."
        )
    return text
