"""The cap on a model's answer: the tokens that the hold covers after the prompt, as the database admits them."""

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Protocol

from trueup.database.retry import retrying
from trueup.errors import HoldExhaustedError
from trueup.gate.holds import Hold
from trueup.gate.provider_calls import begin_call
from trueup.settings.settings import Settings

# More than any hold has: the database refuses a call of this size, and answers with the tokens left.
_MORE_THAN_ANY_HOLD = 2**62
# More than any model answers: the cap where the answer's tokens do not count.
UNLIMITED = 2**20


class Spending(Protocol):
    """A hold that calls spend from, and the tokens that it had left at this process's last look."""

    hold: Hold
    tokens_left: int


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a call may cost, in tokens.

    `prompt_tokens`: the prompt's cost, at most. `wanted`: the caller's own cap on an answer; None: as many as the hold
    covers. `choices`: the answers that the call asks for, each under the same cap; 0: it has none, as an embedding.
    `least`: the smallest cap with which the call makes sense. `beside`: each answer's cost that no cap covers, at most.
    `prompt_weight`, `answer_weight`: how much a token of the prompt and of an answer counts against the hold.
    """

    prompt_tokens: int
    wanted: int | None = None
    choices: int = 1
    least: int = 1
    beside: int = 0
    prompt_weight: Decimal = Decimal(1)
    answer_weight: Decimal = Decimal(1)

    def cost(self, limit: int) -> int:
        """Return what the call costs at most with answers of `limit` tokens, as it counts against the hold."""
        answers = self.choices * (self.beside + limit)
        return _rounded_up(self.prompt_weight * self.prompt_tokens + self.answer_weight * answers)

    def limit(self, tokens: int) -> int:
        """Return the largest cap on an answer that `tokens` of a hold cover; below 0: not even the prompt."""
        room = tokens - self.cost(0)
        each = self.choices * self.answer_weight
        return UNLIMITED if not each and room >= 0 else room if not each else int(room // each)


def _rounded_up(tokens: Decimal) -> int:
    return int(tokens.to_integral_value(ROUND_CEILING))


def cap_output(spending: Spending, demand: Demand, *, call_key: str, settings: Settings) -> int:
    """Record that a call begins, and return the cap on each of its answers in tokens.

    The database decides: if the hold has less left by now, `spending.tokens_left` and the cap become smaller. Raises
    `HoldExhaustedError` when the hold does not cover the prompt and the least answer, `HoldOvertakenError` when a later
    attempt has the hold.
    """
    hold, is_stale = spending.hold, True
    while True:
        limit = demand.limit(spending.tokens_left)
        fits = limit >= (demand.least if demand.choices else 0)
        if not fits and is_stale:
            # A call of another thread may have ended since the last look and left more than is known here.
            spending.tokens_left = _begin(hold, call_key, _MORE_THAN_ANY_HOLD, settings) or 0
            is_stale = False
            continue
        if not fits:
            raise HoldExhaustedError(_too_little(spending, demand))
        if demand.wanted is not None:
            limit = min(limit, demand.wanted)
        left = _begin(hold, call_key, demand.cost(limit), settings)
        if left is None:
            return limit
        spending.tokens_left, is_stale = left, False


def _too_little(spending: Spending, demand: Demand) -> str:
    least = f" The call needs at least {demand.least} tokens for the answer." if demand.least > 1 else ""
    choices = f" It asks for {demand.choices} answers." if demand.choices > 1 else ""
    return (
        f"{spending.hold.feature_name}: {spending.tokens_left} tokens are left of the hold, and the prompt alone "
        f"takes {demand.cost(0)}.{least}{choices} Nothing was spent on this call. Raise the task's estimate or "
        "send less text."
    )


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
