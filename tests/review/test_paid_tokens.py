"""Invariant I8: no machine, no bulk decision and no undo takes away what may be paid tokens; a person may, one by one.

Each test is about a counter that shows such tokens beside a missed decrement of 300, with and without the journal.
"""

from collections.abc import Callable
from datetime import datetime

import pytest
from sqlalchemy import Connection

from tests.support.findings import forget_journal
from tests.support.host import Host
from tests.support.two_books import HOUR, MAPPED, Books
from trueup.reconcile.local_run import reconcile
from trueup.review.decisions import (
    ReviewFilter,
    choose_drifts,
    decide_chosen,
    decide_drift,
    list_reviews,
    undo_run,
)
from trueup.settings.policies import DEFAULT_POLICIES, PAID_CAUSES, UNCORRECTABLE_CAUSES, Rules

MISSED = 300
# Everything that may be set to "correct" is.
BOLD = Rules(
    min_age_seconds=0,
    policies={cause: "correct" for cause in DEFAULT_POLICIES if cause not in PAID_CAUSES | UNCORRECTABLE_CAUSES},
)
BY = {"by": "ann", "note": "n"}


def now(books: Books) -> datetime:
    at: datetime = books.host.value("SELECT clock_timestamp()")
    return at


def by_hand(books: Books, tokens: int) -> None:
    books.host.execute("SELECT set_config('application_name', 'psql', false)")
    books.add(tokens)
    books.host.execute("SELECT set_config('application_name', 'shop', false)")


def a_pack(books: Books) -> int:
    books.pay(books.host.plan(20_000), now(books))
    books.add(20_000)
    return 20_000


def a_pack_credited_twice(books: Books) -> int:
    a_pack(books)
    books.add(20_000)
    return 40_000


def a_renewal(books: Books) -> int:
    books.pay(books.own_plan(), now(books))
    books.add(10_000)
    return 10_000


def an_edit_of_a_plans_size(books: Books) -> int:
    books.host.plan(7_777)
    by_hand(books, 7_777)
    return 7_777


def an_edit_of_a_payments_size(books: Books) -> int:
    """The payment is older than any raise of the counter for it."""
    plan = books.host.plan(5_555)
    books.pay(plan, now(books) - 30 * HOUR)
    books.host.execute("UPDATE billing_tokenplan SET tokens_included = 5555 WHERE id = :plan", plan=plan)
    by_hand(books, 5_555)
    return 5_555


def the_rest_of_the_period_before(books: Books) -> int:
    books.pay(books.own_plan(), now(books) - 300 * HOUR, reference="t0")
    books.spend(6_000)
    rest = books.host.counter(books.user)
    assert rest is not None
    books.host.execute(
        "UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = tokens_remaining + 10000"
    )
    books.pay(books.own_plan(), now(books))
    return rest


Source = Callable[[Books], int]
SOURCES: tuple[Source, ...] = (
    a_pack,
    a_pack_credited_twice,
    a_renewal,
    an_edit_of_a_plans_size,
    an_edit_of_a_payments_size,
    the_rest_of_the_period_before,
)


@pytest.fixture(scope="module")
def template_database(mapped_template: str) -> str:
    return mapped_template


@pytest.fixture(params=["journal", "no journal"])
def books(request: pytest.FixtureRequest, host: Host, connection: Connection) -> Books:
    if request.param == "no journal":
        forget_journal(host)
    books = Books(host, connection)
    books.host.execute("SELECT set_config('application_name', 'shop', false)")
    books.spend(100)
    reconcile(host.engine, MAPPED, rules=BOLD)
    return books


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__)
def paid(request: pytest.FixtureRequest, books: Books) -> int:
    """The tokens that the counter shows beyond the plan, and that may be paid; and a decrement that was missed."""
    tokens: int = request.param(books)
    books.log_now(MISSED)
    return tokens


def surplus(books: Books) -> int:
    """Return by how much the counter is above plan less usage."""
    counter = books.host.counter(books.user)
    assert counter is not None
    used: int = books.host.value(
        "SELECT coalesce(sum(l.total_tokens), 0) FROM ai_usage_log l JOIN billing_subscription s USING (user_id) "
        "WHERE l.success AND l.created_at >= s.start_date"
    )
    return counter - (10_000 - used)


def run(books: Books) -> int:
    number = reconcile(books.host.engine, MAPPED, rules=BOLD).run_id
    assert number is not None
    return number


def test_no_run_takes_them(books: Books, paid: int) -> None:
    for _ in range(3):
        run(books)
        assert surplus(books) in (paid, paid + MISSED)
        books.spend(7)
    assert list_reviews(books.connection, "bigint") != []


def test_no_bulk_decision_takes_them(books: Books, paid: int) -> None:
    run(books)
    for item in list_reviews(books.connection, "bigint"):
        only = ReviewFilter(causes=tuple(item.cause.split("+")))
        made = decide_chosen(
            books.connection, "bigint", choose_drifts(books.connection, "bigint", only), "accept", **BY
        )
        assert (made.decided, made.left) == (0, {"may_be_paid": 1})
    assert surplus(books) in (paid, paid + MISSED)


def test_no_undo_takes_them(books: Books, paid: int) -> None:
    runs = [run(books), run(books)]
    for number in reversed(runs):
        undo_run(books.connection, number, "bigint", **BY)
        assert surplus(books) in (paid, paid + MISSED)
    run(books)
    assert surplus(books) in (paid, paid + MISSED)


def test_a_person_takes_or_grants_them_one_by_one(books: Books, paid: int) -> None:
    run(books)
    (item,) = list_reviews(books.connection, "bigint")
    decide_drift(books.connection, item.id, "accept", **BY)
    assert surplus(books) == 0
