"""The cap on a model's answer: the tokens that the hold covers after the prompt, as the database admits them."""

from typing import Protocol

from trueup.database.retry import retrying
from trueup.errors import HoldExhaustedError
from trueup.gate.holds import Hold
from trueup.gate.provider_calls import begin_call
from trueup.settings.settings import Settings

# More than any hold has: the database refuses a call of this size, and answers with the tokens left.
_MORE_THAN_ANY_HOLD = 2**62


class Spending(Protocol):
    """A hold that calls spend from, and the tokens that it had left at this process's last look."""

    hold: Hold
    tokens_left: int


def cap_output(spending: Spending, prompt_tokens: int, wanted: int | None, *, call_key: str, settings: Settings) -> int:
    """Record that a call begins, and return the cap on its answer in tokens.

    `wanted`: the caller's own cap in tokens; None: as many as the hold covers. The database decides: if the hold has
    less left by now, `spending.tokens_left` and the cap become smaller. Raises `HoldExhaustedError` when the hold does
    not cover the prompt and one token of answer, `HoldOvertakenError` when a later attempt has the hold.
    """
    hold, is_stale = spending.hold, True
    while True:
        limit = spending.tokens_left - prompt_tokens
        if limit < 1 and is_stale:
            # A call of another thread may have ended since the last look and left more than is known here.
            spending.tokens_left = _begin(hold, call_key, _MORE_THAN_ANY_HOLD, settings) or 0
            is_stale = False
            continue
        if limit < 1:
            raise HoldExhaustedError(
                f"{hold.feature_name}: {spending.tokens_left} tokens are left of the hold, and the prompt alone "
                f"takes {prompt_tokens}. Nothing was spent on this call. Raise the task's estimate or send less text."
            )
        if wanted is not None:
            limit = min(limit, wanted)
        left = _begin(hold, call_key, prompt_tokens + limit, settings)
        if left is None:
            return limit
        spending.tokens_left, is_stale = left, False


def _begin(hold: Hold, call_key: str, max_tokens: int, settings: Settings) -> int | None:
    """Ask the database to admit the call. Returns None if it does, else the fewer tokens that the hold has left."""
    return retrying(
        lambda connection: begin_call(
            connection,
            hold,
            call_key=call_key,
            max_tokens=max_tokens,
            lease_seconds=settings.lease_seconds,
            ttl_seconds=settings.hold_ttl_seconds,
        )
    )
