from datetime import datetime, timedelta

import pytest
from sqlalchemy import Connection

from tests.support.host import START, Host
from tests.support.sessions import locked
from tests.support.work import charge_tokens, hold_tokens
from trueup.gate.holds import Hold
from trueup.usage.charges import find_answer, prune_answers

NOW = START + timedelta(days=30)
WEEK = timedelta(days=7)


@pytest.fixture
def hold(host: Host, connection: Connection) -> Hold:
    return hold_tokens(connection, host.subscriber(10_000), 1_000)


def pay(connection: Connection, hold: Hold, key: str, at: datetime, *, answered: bool = True) -> None:
    charge_tokens(connection, hold, 10, key=key, now=at, answer={"text": key} if answered else None)


def test_answers_older_than_the_age_are_deleted_and_the_charges_stay(
    host: Host, connection: Connection, hold: Hold
) -> None:
    pay(connection, hold, "older", NOW - WEEK - timedelta(seconds=1))
    pay(connection, hold, "as old", NOW - WEEK)
    pay(connection, hold, "young", NOW)
    pay(connection, hold, "never kept", NOW - 2 * WEEK, answered=False)
    assert prune_answers(connection, older_than=WEEK, limit=100, now=NOW) == 1
    kept = {key: find_answer(connection, hold, key) for key in ("older", "as old", "young", "never kept")}
    assert kept == {"older": None, "as old": {"text": "as old"}, "young": {"text": "young"}, "never kept": None}
    assert host.value("SELECT count(*) FROM trueup.charge") == 4
    assert charge_tokens(connection, hold, 10, key="older").recorded is False


def test_pruning_is_bounded_and_continues_where_it_ended(host: Host, connection: Connection, hold: Hold) -> None:
    for number in range(5):
        pay(connection, hold, str(number), NOW - 2 * WEEK)
    pruned = [prune_answers(connection, older_than=WEEK, limit=2, now=NOW) for _ in range(4)]
    assert pruned == [2, 2, 1, 0]
    assert host.value("SELECT count(*) FROM trueup.charge WHERE answer IS NOT NULL") == 0


def test_pruning_skips_a_locked_charge(host: Host, connection: Connection, hold: Hold) -> None:
    for key in "ab":
        pay(connection, hold, key, NOW - 2 * WEEK)
    with locked(host, "SELECT * FROM trueup.charge WHERE call_key = 'a' FOR UPDATE"):
        assert prune_answers(connection, older_than=WEEK, limit=100, now=NOW) == 1
    assert find_answer(connection, hold, "a") == {"text": "a"}
    assert find_answer(connection, hold, "b") is None


def test_without_an_injected_clock_the_databases_counts(connection: Connection, hold: Hold) -> None:
    charge_tokens(connection, hold, 10, answer={"text": "now"})
    assert prune_answers(connection, older_than=timedelta(hours=1), limit=10) == 0
    assert prune_answers(connection, older_than=timedelta(0), limit=10) == 1


def test_an_answer_bought_after_an_incomplete_one_is_kept_for_the_next_delivery(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    charge_tokens(connection, hold_tokens(connection, user, task="t"), 10, key="1:a")
    second = hold_tokens(connection, user, task="t", retries=1)
    charge_tokens(connection, second, 20, key="1:a", answer={"text": "whole"})
    third = hold_tokens(connection, user, task="t", retries=2)
    assert find_answer(connection, third, "1:a") == {"text": "whole"}
    assert find_answer(connection, third, "1:") is None
    assert find_answer(connection, third, "2:a") is None
