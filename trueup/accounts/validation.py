"""Validation of token counts."""

from typing import Any

from trueup.errors import InvalidInputError

MAX_TOKENS = 2**63 - 1


def check_estimate(estimated_tokens: Any, field: str = "estimated_tokens", *, least: int = 0) -> int:
    """Return the count of tokens. Raises `InvalidInputError`, a ValueError, if it is no integer of at least `least`."""
    if isinstance(estimated_tokens, bool) or not isinstance(estimated_tokens, int):
        raise InvalidInputError(f"{field}: {estimated_tokens!r} is no whole number of tokens.")
    if not least <= estimated_tokens <= MAX_TOKENS:
        raise InvalidInputError(f"{field}: {estimated_tokens} is out of range. Give {least} to {MAX_TOKENS}.")
    return estimated_tokens
