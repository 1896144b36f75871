"""The cap on an answer, and what the caller of a call that the hold does not cover reads."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.errors import HoldExhaustedError
from trueup.gate.holds import Hold
from trueup.llm.calls import fingerprint_of
from trueup.llm.output_cap import Demand, cap_output
from trueup.settings.settings import get_settings

ANY_LENGTH = 2**20


@dataclass
class Spending:
    """A hold, and what its process believes to be left of it."""

    hold: Hold
    tokens_left: int


def cap(spending: Spending, demand: Demand, key: str = "1") -> int:
    return cap_output(spending, demand, call_key=key, settings=get_settings())


@pytest.mark.parametrize(
    ("demand", "tokens", "limit"),
    [
        ({}, 100, 90),
        ({}, 10, 0),
        ({}, 9, -1),
        ({"choices": 4}, 100, 22),
        ({"choices": 4}, 97, 21),
        ({"choices": 2, "beside": 5}, 100, 40),
        ({"answer_weight": Decimal("2.5")}, 100, 36),
        ({"prompt_weight": Decimal("1.25")}, 100, 87),
        ({"choices": 2, "answer_weight": Decimal("2.5"), "beside": 3}, 100, 15),
        # No token of an answer counts: an embedding, or an answer that weighs nothing.
        ({"choices": 0}, 100, ANY_LENGTH),
        ({"choices": 0}, 10, ANY_LENGTH),
        ({"choices": 0}, 9, -1),
        ({"answer_weight": Decimal(0)}, 10, ANY_LENGTH),
        ({"answer_weight": Decimal(0)}, 9, -1),
    ],
)
def test_the_largest_cap_is_the_one_whose_cost_the_tokens_cover(
    demand: dict[str, Any], tokens: int, limit: int
) -> None:
    asked = Demand(prompt_tokens=10, **demand)
    assert asked.limit(tokens) == limit
    assert (asked.cost(max(limit, 0)) <= tokens) is (limit >= 0)
    assert limit in (ANY_LENGTH, -1) or asked.cost(limit + 1) > tokens


@pytest.mark.parametrize(
    ("demand", "tokens", "message"),
    [
        ({"prompt_tokens": 101}, 100, "100 tokens are left of the hold, and the prompt alone takes 101. Nothing was"),
        ({"prompt_tokens": 100}, 100, "the prompt alone takes 100. Nothing was spent"),
        (
            {"prompt_tokens": 90, "least": 11},
            100,
            "takes 90. The call needs at least 11 tokens for the answer. Nothing was",
        ),
        ({"prompt_tokens": 90, "choices": 11}, 100, "takes 90. It asks for 11 answers. Nothing was spent"),
    ],
)
def test_a_call_that_the_hold_does_not_cover_is_refused_with_its_figures(
    host: Host, connection: Connection, demand: dict[str, Any], tokens: int, message: str
) -> None:
    hold = hold_tokens(connection, host.subscriber(1_000), tokens)
    with pytest.raises(HoldExhaustedError) as refused:
        cap(Spending(hold, hold.tokens_left), Demand(**demand))
    assert message in str(refused.value)
    assert host.value("SELECT count(*) FROM trueup.call_intent") == 0


@pytest.mark.parametrize(
    ("demand", "limit", "bound"),
    [
        ({"prompt_tokens": 40}, 60, 100),
        ({"prompt_tokens": 40, "wanted": 5}, 5, 45),
        ({"prompt_tokens": 40, "wanted": 500}, 60, 100),
        ({"prompt_tokens": 90, "least": 10}, 10, 100),
        ({"prompt_tokens": 100, "choices": 0}, ANY_LENGTH, 100),
    ],
)
def test_a_call_that_the_hold_covers_to_the_last_token_begins(
    host: Host, connection: Connection, demand: dict[str, Any], limit: int, bound: int
) -> None:
    hold = hold_tokens(connection, host.subscriber(1_000), 100)
    assert cap(Spending(hold, 100), Demand(**demand)) == limit
    assert host.value("SELECT tokens_bound FROM trueup.call_intent") == bound


@pytest.mark.parametrize("believed", [0, 45, 100, 5_000])
def test_the_database_decides_how_much_is_left(host: Host, connection: Connection, believed: int) -> None:
    """Calls of other threads may have left more or less than this thread knows."""
    hold = hold_tokens(connection, host.subscriber(1_000), 100)
    charge_tokens(connection, hold, 30, key="0")
    spending = Spending(hold, believed)
    assert cap(spending, Demand(prompt_tokens=40)) == (5 if believed == 45 else 30)
    spending.tokens_left = believed
    with pytest.raises(HoldExhaustedError, match=f"{25 if believed == 45 else 0} tokens are left"):
        cap(spending, Demand(prompt_tokens=40), key="2")
    assert spending.tokens_left == (25 if believed == 45 else 0)


def test_the_fingerprint_of_a_request_is_that_of_its_value() -> None:
    first, second = {"model": "m", "seed": 1}, {"seed": 1, "model": "m"}
    assert fingerprint_of(first) == fingerprint_of(second) != fingerprint_of(first | {"seed": 2})
