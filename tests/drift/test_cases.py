"""Cases from real hosts, each with its figures: what the counter showed, and the causes that are right."""

import pytest
from sqlalchemy import Connection

from tests.support.findings import forget_journal
from tests.support.host import Host
from tests.support.two_books import DAY, HOUR, MAPPED, SECOND, Books
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.review.decisions import ReviewFilter, choose_drifts, decide_chosen, list_reviews
from trueup.settings.policies import Rules

RULES = Rules(min_age_seconds=0)


def test_a_job_that_saves_a_counter_of_twenty_seconds_ago_loses_the_requests_since(journaled: Books) -> None:
    """Plan 20,000, counter 15,000; requests of 400 and 600 while a job of 900 runs on the old object."""
    host = journaled.host
    host.execute("UPDATE billing_tokenplan SET tokens_included = 20000")
    journaled.set(20_000)
    journaled.spend(5_000)
    reconcile(host.engine, MAPPED, rules=RULES)
    for tokens in (400, 600):
        journaled.spend(tokens)
    journaled.log_now(900)
    journaled.set(15_000 - 900)
    (stale,) = journaled.explained_now().components
    assert (stale.cause, stale.tokens, stale.certainty) == ("stale_write", 1_000, "proven")
    assert [entry["new"] for entry in stale.evidence["entries"]] == [14_100, 14_600, 14_000]
    assert reconcile(host.engine, MAPPED, rules=RULES).corrected == 1
    assert host.counter(journaled.user) == 13_100


@pytest.mark.parametrize("with_journal", [True, False])
def test_a_plan_that_ended_and_was_bought_again_kept_the_rest_of_its_first_period(
    host: Host, connection: Connection, with_journal: bool
) -> None:
    """Plan 100,000, of which 6,293 were used; the same plan again, and the counter shows 193,707."""
    with host.engine.begin() as setup:
        install(setup, MAPPED, with_host_tables=True)
    if not with_journal:
        forget_journal(host)
    books = Books(host, connection)
    now = host.value("SELECT clock_timestamp()")
    books.user = host.subscriber(100_000, kind="full", start=now - 40 * DAY)
    plan = host.value("SELECT full_plan_id FROM billing_subscription WHERE user_id = :user", user=books.user)
    pay = (
        "INSERT INTO billing_payment (user_id, full_plan_id, status, payment_date, transaction_id) "
        "VALUES (:user, :plan, 'completed', :at, :reference)"
    )
    host.execute(pay, user=books.user, plan=plan, at=now - 40 * DAY, reference="first")
    books.log(6_293, now - 30 * DAY)
    books.lower(6_293, now - 30 * DAY)
    host.execute(
        "UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = tokens_remaining + 100000 "
        "WHERE user_id = :user",
        user=books.user,
    )
    host.execute(pay, user=books.user, plan=plan, at=host.value("SELECT clock_timestamp()"), reference="second")
    assert host.counter(books.user) == 193_707
    assert {part.cause: part.tokens for part in books.explained_now().components} == {"carried_over_tokens": 93_707}
    summary = reconcile(host.engine, MAPPED, rules=RULES)
    assert (summary.corrected, summary.in_review) == (0, 1)
    edits = choose_drifts(connection, "bigint", ReviewFilter(causes=("manual_edit",)))
    assert edits.drifts == 0
    carried = choose_drifts(connection, "bigint", ReviewFilter(causes=("carried_over_tokens",)))
    made = decide_chosen(connection, "bigint", carried, "accept", by="ann", note="n")
    assert (made.decided, made.left) == (0, {"may_be_paid": 1})
    assert host.counter(books.user) == 193_707
    assert len(list_reviews(connection, "bigint")) == 1


def test_a_row_subtracted_twice_and_the_next_one_cut_off_at_zero(journaled: Books) -> None:
    """5,000 remain, the counter shows 867 because a row of 4,133 was subtracted twice; then a request of 1,299."""
    reconcile(journaled.host.engine, MAPPED, rules=RULES)
    for tokens in (867, 4_133):
        journaled.spend(tokens)
    journaled.host.decrement(journaled.user, 4_133)
    assert (journaled.host.counter(journaled.user), journaled.drift(0).expected) == (867, 5_000)
    journaled.log_now(1_299)
    journaled.set(0)
    journaled.row(867, journaled.host.value("SELECT clock_timestamp()"))
    assert journaled.drift(0).tokens == -3_701
    assert {part.cause: part.tokens for part in journaled.explained_now().components} == {
        "double_decrement": -4_133,
        "clamped_at_zero": 432,
    }
    reconcile(journaled.host.engine, MAPPED, rules=RULES)
    assert journaled.host.counter(journaled.user) == 3_701


def test_a_pack_of_a_host_that_rarely_writes_decrement_rows_is_never_taken(host: Host, connection: Connection) -> None:
    """Plan 20,000; 50 requests of 100 lower the counter, three with a row; a pack of 3,000, and 37 more."""
    with host.engine.begin() as setup:
        install(setup, MAPPED, with_host_tables=True)
    books = Books(host, connection)
    now = host.value("SELECT clock_timestamp()")
    books.user = host.subscriber(20_000, start=now - 20 * DAY)
    for place in range(50):
        at = now - 10 * DAY + place * HOUR
        books.log(100, at)
        host.decrement(books.user, 100)
        if place < 3:
            books.row(100, at + SECOND)
    pack = host.value(
        "INSERT INTO billing_tokenplan (id, name, tokens_included, is_active) "
        "VALUES (99, 'pack', 3000, true) RETURNING id"
    )
    books.pay(pack, now - 5 * DAY)
    books.add(3_037)
    forget_journal(host)
    summary = reconcile(host.engine, MAPPED, rules=RULES)
    assert (summary.corrected, summary.in_review) == (0, 1)
    assert host.counter(books.user) == 15_000 + 3_037
