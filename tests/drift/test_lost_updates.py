"""Lost updates: the decrements that another one may have overwritten, by the times of log rows and decrements."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.support.host import START
from tests.support.two_books import HOUR, MAPPED, MINUTE, NOON, SECOND, Books
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import get_engine
from trueup.drift.detect import Drift, find_drifts
from trueup.drift.explain import explain
from trueup.reconcile import batch
from trueup.reconcile.local_run import reconcile
from trueup.settings.policies import Rules

TENTH = timedelta(seconds=0.1)


def overlap(books: Books, lost: int, kept: int, at: datetime = NOON, *, is_lost: bool = True) -> tuple[str, str]:
    """Make two overlapping requests. Returns the rows of their decrements; the second one is written last."""
    books.log(lost, at)
    books.log(kept, at + TENTH)
    first = books.row(lost, at + 2 * TENTH) if is_lost else books.lower(lost, at + 2 * TENTH - SECOND)
    second = books.lower(kept, at + 3 * TENTH - SECOND)
    return first, second


def in_sequence(books: Books, *sizes: int) -> None:
    """Make requests one after the other, all within a second."""
    for number, tokens in enumerate(sizes):
        books.log(tokens, NOON + 2 * number * TENTH)
        books.lower(tokens, NOON + (2 * number + 1) * TENTH - SECOND)


@pytest.mark.parametrize("kept", [120, 300])
def test_of_two_overlapping_requests_the_first_write_is_lost(books: Books, kept: int) -> None:
    rows = overlap(books, 300, kept)
    (part,) = books.explained().components
    assert (part.cause, part.tokens) == ("lost_update", 300)
    assert [row["id"] for row in part.evidence["rows"]] == list(rows)
    assert books.explained().alternatives == ()


def test_a_gift_of_the_lost_amount_leaves_the_same_rows(books: Books) -> None:
    """Rows can't distinguish them, so a sum that a gift may match by chance needs a person."""
    overlap(books, 300, 120)
    subscription, explanation = books.host.execute("SELECT * FROM billing_subscription").one(), books.explained()
    # The alternative: both were subtracted, and a person gave 300.
    books.host.decrement(books.user, 300)
    books.add(300)
    assert books.host.execute("SELECT * FROM billing_subscription").one() == subscription
    assert books.explained() == explanation


def test_a_lost_second_write_may_be_a_manual_edit_too(books: Books) -> None:
    overlap(books, 300, 120, is_lost=False)
    books.add(120)
    explanation = books.explained()
    assert (explanation.cause, explanation.alternatives) == ("lost_update", ("manual_edit",))


def test_requests_one_after_the_other_overwrite_nothing(books: Books) -> None:
    in_sequence(books, 300, 120, 70)
    books.add(120)
    assert books.drift().evidence.concurrent == []
    assert books.shares() == {"manual_edit": 120}


def test_a_retry_has_no_log_row_of_its_own_and_proves_nothing(books: Books) -> None:
    """The beginning of its request is not known, so the decrement before it may be lost or not."""
    in_sequence(books, 300, 120)
    books.lower(300, NOON + 5 * TENTH - SECOND)
    books.add(120)
    explanation = books.explained()
    assert explanation.cause == "double_decrement+lost_update"
    assert "manual_edit" in explanation.alternatives


def test_decrements_three_seconds_apart_did_not_meet(books: Books) -> None:
    books.log(300)
    books.log(120)
    books.row(120, NOON + SECOND)
    books.lower(300, NOON + 3 * SECOND)
    assert books.shares() == {"manual_edit": 120}


def test_several_lost_updates_add_up(books: Books) -> None:
    for number, tokens in enumerate((310, 1_207, 85)):
        overlap(books, tokens, 44 + number, NOON + number * HOUR)
    overlap(books, 999, 40, NOON + 3 * HOUR, is_lost=False)
    explanation = books.explained()
    assert [part.tokens for part in explanation.components] == [310, 1_207, 85]
    assert (explanation.cause, explanation.alternatives) == ("lost_update", ())
    run()
    assert books.host.counter(books.user) == 10_000 - (310 + 44 + 1_207 + 45 + 85 + 46 + 999 + 40)


def test_a_charge_that_the_host_overwrote_is_lost(books: Books) -> None:
    hold = hold_tokens(books.connection, books.user)
    now = books.host.value("SELECT clock_timestamp()")
    books.log(120, now)
    charge_tokens(books.connection, hold, 300, key="overwritten")
    books.add(300)
    books.host.decrement(books.user, 120)
    books.row(120, books.host.value("SELECT clock_timestamp()"))
    (part,) = books.explained().components
    assert (part.cause, part.tokens, part.evidence["rows"][0]["own"]) == ("lost_update", 300, True)


def test_an_earlier_complete_explanation_settles_older_lost_updates(books: Books) -> None:
    overlap(books, 310, 44, is_lost=False)
    overlap(books, 77, 45, NOON + MINUTE)
    books.log(500)
    run(policies={"missed_decrement": "report", "lost_update": "report"})
    assert books.host.value("SELECT cause FROM trueup.drift") == "missed_decrement+lost_update"
    overlap(books, 200, 46, books.host.value("SELECT clock_timestamp()"))
    lost = [part.tokens for part in books.explained().components if part.cause == "lost_update"]
    assert lost == [77, 200]
    books.add(310)
    # Later decrements may be lost or not; settled lost updates stay, whatever else explains the sum.
    assert books.shares() == {"missed_decrement": 500, "lost_update": 77, "manual_edit": 200 + 310}


def test_a_drift_left_to_a_person_settles_nothing(books: Books) -> None:
    overlap(books, 310, 44, is_lost=False)
    books.log(500)
    run(policies={"missed_decrement": "review"})
    books.add(310)
    assert books.shares() == {"lost_update": 310, "missed_decrement": 500}


def corrected_just_now(books: Books) -> datetime:
    """Let trueup correct 500 tokens that were logged and not subtracted. Returns the correction's time."""
    books.log(500)
    run(min_age_seconds=0)
    assert books.host.counter(books.user) == 9_500
    at: datetime = books.host.value("SELECT CAST(evidence ->> 'written_at' AS timestamptz) FROM trueup.drift")
    return at


def test_a_correction_that_a_running_request_overwrote_is_made_again(books: Books) -> None:
    at = corrected_just_now(books)
    books.log(120, at - TENTH)
    books.add(500)
    row = books.lower(120, at + TENTH - SECOND)
    (part, *_) = books.explained().components
    assert (part.cause, part.tokens, part.evidence["overwritten_by"]["id"]) == ("lost_update", 500, row)
    run(min_age_seconds=0)
    assert books.host.counter(books.user) == 9_380


@pytest.mark.parametrize("later", [None, 3 * SECOND])
def test_tokens_that_a_person_gives_back_after_a_correction_are_not_taken_again(
    books: Books, later: timedelta | None
) -> None:
    """No request was running at the correction, so none can have overwritten it."""
    at = corrected_just_now(books)
    books.add(500)
    if later is not None:
        books.use(120, at + later)
    explanation = books.explained()
    assert (explanation.cause, explanation.alternatives) == ("lost_update", ("manual_edit",))
    before = books.host.counter(books.user)
    for _ in range(2):
        run(min_age_seconds=0)
        assert books.host.counter(books.user) == before
    assert books.host.value("SELECT action FROM trueup.drift ORDER BY id DESC LIMIT 1") == "review"


def run(**rules: Any) -> None:
    reconcile(get_engine(), MAPPED, rules=Rules(**rules))


# --- Between the comparison and the correction --------------------------------------------------------------------


def test_a_row_just_before_the_comparison_is_not_counted_twice(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base point of a correction is the time of its snapshot, not an earlier one."""

    def late(*args: Any, **more: Any) -> list[Drift]:
        books.log(300, books.host.value("SELECT clock_timestamp()"))
        return find_drifts(*args, **more)

    monkeypatch.setattr(batch, "find_drifts", late)
    run(min_age_seconds=0)
    assert books.host.counter(books.user) == 9_700
    books.add(50)
    explanation = explain(books.drift(0), plan_sizes=frozenset(), counter_limit=2**31 - 1, now=NOON)
    assert [(part.cause, part.tokens) for part in explanation.components] == [("manual_edit", 50)]


def test_tokens_held_in_an_earlier_period_hold_nothing_back_now(books: Books) -> None:
    books.add(50)
    run()
    assert books.host.value("SELECT action FROM trueup.drift") == "review"
    books.host.execute("UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = 10000")
    books.log(300, books.host.value("SELECT clock_timestamp()"))
    run(min_age_seconds=0)
    assert books.host.counter(books.user) == 9_700


def test_rows_before_the_period_do_not_hide_rows_at_its_beginning(books: Books) -> None:
    books.log(300, START - 9 * MINUTE)
    for number in range(9):
        books.use(400 + number, START + (10 + number) * SECOND)
        books.log(400 + number, START - (10 + number) * SECOND)
    books.use(300, START + SECOND)
    books.lower(300, START + 3 * SECOND)
    assert books.shares() == {"double_decrement": -300}


def test_a_log_row_before_the_period_is_no_match_if_there_is_a_nearer_one(books: Books) -> None:
    books.log(300, START - MINUTE)
    books.use(300, START + SECOND)
    books.add(50)
    assert books.shares() == {"manual_edit": 50}
