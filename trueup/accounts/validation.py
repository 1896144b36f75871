"""What a count of tokens may be."""

from typing import Any

from trueup.errors import InvalidInputError

MAX_TOKENS = 2**63 - 1


def check_estimate(estimated_tokens: Any, field: str = "estimated_tokens") -> int:
    """Return the estimate if it is a count of tokens. Raises `InvalidInputError`, a ValueError, if not."""
    if isinstance(estimated_tokens, bool) or not isinstance(estimated_tokens, int):
        raise InvalidInputError(f"{field}: {estimated_tokens!r} is no whole number of tokens")
    if not 0 <= estimated_tokens <= MAX_TOKENS:
        raise InvalidInputError(f"{field}: {estimated_tokens} is out of range: give 0 to {MAX_TOKENS}")
    return estimated_tokens
