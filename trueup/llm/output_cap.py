"""How long a model's answer may become: what the hold covers after the prompt, as the database allows it."""

from typing import Protocol

from trueup.database.retry import retrying
from trueup.errors import HoldExhaustedError
from trueup.gate.holds import Hold
from trueup.gate.provider_calls import begin_call
from trueup.settings.settings import Settings


class Spending(Protocol):
    """A hold that calls spend from, and what it had left when this process last heard of it."""

    hold: Hold
    tokens_left: int


def cap_output(spending: Spending, prompt_tokens: int, wanted: int | None, *, call_key: str, settings: Settings) -> int:
    """Record that a call begins. Returns how many tokens of answer it may have, at most `wanted`.

    The database decides: if the hold has less left by now, `spending.tokens_left` and the cap become smaller. `wanted`
    None: as many as the hold covers. Raises `HoldExhaustedError` when it does not cover the prompt and one token of
    answer, `HoldOvertakenError` when a later attempt has the hold.
    """
    hold = spending.hold
    while True:
        limit = spending.tokens_left - prompt_tokens
        if limit < 1:
            raise HoldExhaustedError(
                f"{hold.feature_name}: {spending.tokens_left} tokens are left of the hold, the prompt alone takes "
                f"{prompt_tokens}. Nothing was spent on this call. Raise the task's estimate, or send less text."
            )
        if wanted is not None:
            limit = min(limit, wanted)
        left = _begin(hold, call_key, prompt_tokens + limit, settings)
        if left is None:
            return limit
        spending.tokens_left = left


def _begin(hold: Hold, call_key: str, max_tokens: int, settings: Settings) -> int | None:
    """Ask the database. Returns None if it allows the call, else what the hold has left: less."""
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
