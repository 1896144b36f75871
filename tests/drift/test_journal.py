"""Causes that the journal proves, on a real host, and decisions by component."""

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.two_books import MAPPED, Books
from trueup.drift.journal import tell_story
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.review.decisions import (
    DecisionRefusedError,
    ReviewFilter,
    choose_drifts,
    decide_chosen,
    decide_drift,
    list_reviews,
    undo_run,
)
from trueup.settings.policies import Rules

RULES = Rules(min_age_seconds=0)


@pytest.fixture
def books(journaled: Books) -> Books:
    """A subscriber whose counter a run has found right."""
    run(journaled)
    return journaled


def run(books: Books) -> RunSummary:
    return reconcile(books.host.engine, MAPPED, rules=RULES)


def parts(books: Books) -> list[tuple[str, int, str]]:
    return [(part.cause, part.tokens, part.certainty) for part in books.explained_now().components]


def rows(books: Books) -> list[tuple[object, ...]]:
    found = books.host.execute("SELECT action, cause, observed, expected, written FROM trueup.drift ORDER BY id")
    return [tuple(row) for row in found]


def test_a_job_that_saves_an_old_object_overwrites_the_requests_since(books: Books) -> None:
    for tokens in (400, 600):
        books.spend(tokens)
    books.log_now(900)
    books.set(10_000 - 900)
    assert parts(books) == [("stale_write", 1_000, "proven")]
    (stale,) = books.explained_now().components
    assert [entry["new"] for entry in stale.evidence["entries"]] == [9_100, 9_600, 9_000]
    assert run(books).corrected == 1
    assert books.host.counter(books.user) == 8_100


def test_saving_a_whole_object_overwrites_the_requests_since(books: Books) -> None:
    books.spend(400)
    books.set(10_000)
    assert parts(books) == [("stale_write", 400, "proven")]


def test_a_missed_decrement_is_proven(books: Books) -> None:
    books.spend(400)
    log_id = books.log_now(300)
    assert parts(books) == [("missed_decrement", 300, "proven")]
    (missed,) = books.explained_now().components
    assert [row["log_id"] for row in missed.evidence["rows"]] == [log_id]


def test_a_request_subtracted_twice_and_the_next_one_clamped_at_zero(books: Books) -> None:
    """The host's decrement row has only what the counter had: 867 of 1,299."""
    books.spend(867)
    books.spend(4_133)
    books.host.decrement(books.user, 4_133)
    books.log_now(1_299)
    books.set(0)
    books.row(867, books.host.value("SELECT clock_timestamp()"))
    assert parts(books) == [("double_decrement", -4_133, "proven"), ("clamped_at_zero", 432, "inferred")]
    assert books.drift(0).tokens == -3_701


def test_a_counter_that_was_wrong_when_a_run_began_and_right_when_it_was_compared(books: Books) -> None:
    """The run's beginning is no moment at which the counter was right. The journal tells the later one."""
    books.spend(400)
    books.set(9_000)
    began = books.host.value("SELECT clock_timestamp()")
    books.spend(100)
    books.set(9_500)
    books.log_now(300)
    # So far the run compared the counter: between its beginning and its end.
    books.set(9_200)
    assert run(books).drifted == 0
    books.host.execute(
        "UPDATE trueup.reconcile_run SET started_at = :began WHERE id = (SELECT max(id) FROM trueup.reconcile_run)",
        began=began,
    )
    books.log_now(77)
    assert parts(books) == [("missed_decrement", 77, "proven")]
    assert run(books).corrected == 1
    assert books.host.counter(books.user) == 9_123


def test_a_failed_request_that_was_subtracted(books: Books) -> None:
    books.log_now(250, success=False)
    books.host.decrement(books.user, 250)
    assert parts(books) == [("failed_usage_charged", -250, "proven")]


def test_an_edit_by_hand_names_its_application(books: Books) -> None:
    books.host.execute("SET application_name = 'psql'")
    books.add(1_000)
    (edit,) = books.explained_now().components
    assert (edit.cause, edit.tokens, edit.certainty) == ("manual_edit", 1_000, "proven")
    assert edit.evidence["entries"][0]["application_name"] == "psql"
    assert run(books).in_review == 1
    assert books.host.counter(books.user) == 11_000


def test_a_pack_that_is_credited_twice_for_one_payment(books: Books) -> None:
    plan = books.host.plan(20_000)
    books.pay(plan, books.host.value("SELECT clock_timestamp()"))
    books.add(20_000)
    books.add(20_000)
    assert parts(books) == [("credit_without_grant", 20_000, "proven"), ("credited_twice", 20_000, "proven")]
    assert run(books).in_review == 1
    assert books.host.counter(books.user) == 50_000


def test_a_period_that_begins_with_tokens_of_the_one_before_is_carried_over(books: Books) -> None:
    books.spend(6_000)
    books.host.execute(
        "UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = tokens_remaining + 10000"
    )
    assert parts(books) == [("carried_over_tokens", 4_000, "inferred")]


def test_a_period_that_begins_with_the_plan_is_no_drift(books: Books) -> None:
    books.spend(6_000)
    books.host.execute("UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = 10000")
    assert run(books).drifted == 0
    books.log_now(70)
    assert parts(books) == [("missed_decrement", 70, "proven")]


def test_a_certain_component_is_corrected_although_another_one_waits(books: Books) -> None:
    plan = books.host.plan(20_000)
    books.pay(plan, books.host.value("SELECT clock_timestamp()"))
    books.add(20_000)
    books.log_now(700)
    summary = run(books)
    assert (summary.drifted, summary.corrected, summary.in_review) == (1, 1, 1)
    assert books.host.counter(books.user) == 29_300
    assert rows(books) == [
        ("corrected", "missed_decrement", 30_000, 29_300, 29_300),
        ("review", "credit_without_grant", 29_300, 9_300, None),
    ]
    again = run(books)
    assert (again.found_new, again.corrected, again.in_review) == (0, 0, 1)
    books.log_now(100)
    later = run(books)
    assert (later.corrected, later.in_review) == (1, 1)
    assert books.host.counter(books.user) == 29_200
    assert rows(books)[2:] == [
        ("corrected", "missed_decrement", 29_300, 29_200, 29_200),
        ("review", "credit_without_grant", 29_200, 9_200, None),
    ]


def test_usage_of_a_moment_ago_is_in_flight_and_its_late_decrement_no_drift(books: Books) -> None:
    books.log_now(300)
    reconcile(books.host.engine, MAPPED, rules=Rules(min_age_seconds=600))
    assert rows(books)[-1][0] == "waiting"
    books.host.decrement(books.user, 300)
    assert run(books).drifted == 0
    books.log_now(50)
    assert parts(books) == [("missed_decrement", 50, "proven")]


def test_without_a_journal_a_cause_is_never_proven(books: Books) -> None:
    books.host.execute("DELETE FROM trueup.journal_start")
    books.log_now(300)
    assert {part.certainty for part in books.explained_now().components} == {"inferred"}


def test_backdated_rows_do_not_move_the_time_when_the_counter_was_known_to_be_right(books: Books) -> None:
    books.spend(50)
    run(books)
    known = books.host.value("SELECT max(started_at) FROM trueup.reconcile_run")
    books.log(300)
    books.row(300)
    base = books.drift(0).evidence.base
    assert (base.kind, base.moment) == ("run", known)


def test_backdated_rows_are_explained_by_rows_alone(books: Books) -> None:
    books.log(300)
    books.spend(50)
    assert not books.explained_now().by_component


@pytest.mark.parametrize("lost", [1, 3])
def test_the_journal_of_a_host_that_writes_while_a_correction_is_made_stays_exact(books: Books, lost: int) -> None:
    for number in range(lost):
        books.log_now(100 + number)
    run(books)
    books.spend(40)
    books.log_now(7)
    assert parts(books) == [("missed_decrement", 7, "proven")]
    run(books)
    assert run(books).drifted == 0
    assert books.host.counter(books.user) == 10_000 - books.host.used(books.user)


@pytest.fixture
def mixed(books: Books) -> int:
    """A drift in review with a credited pack and an edit by hand; gives its number."""
    books.pay(books.host.plan(20_000), books.host.value("SELECT clock_timestamp()"))
    books.add(20_000)
    books.host.execute("SET application_name = 'psql'")
    books.add(777)
    assert run(books).in_review == 1
    number: int = books.host.value("SELECT max(id) FROM trueup.drift")
    assert [part[:2] for part in parts(books)] == [("credit_without_grant", 20_000), ("manual_edit", 777)]
    return number


def test_one_component_is_granted_and_the_other_corrected(books: Books, mixed: int) -> None:
    by = {"by": "ann", "note": "checked"}
    granted = decide_drift(books.connection, mixed, "grant", component=1, reference="tx-1", **by)
    assert (granted.tokens_granted, granted.counter_after) == (20_000, 30_777)
    assert decide_drift(books.connection, mixed, "grant", component=1, reference="tx-1", **by).already
    with pytest.raises(DecisionRefusedError, match="is newer and replaces it"):
        decide_drift(books.connection, mixed, "accept", component=2, **by)
    (left,) = list_reviews(books.connection, "bigint")
    assert (left.cause, left.tokens, left.changed) == ("manual_edit", 777, False)
    accepted = decide_drift(books.connection, left.id, "accept", component=1, **by)
    assert accepted.counter_after == 30_000
    assert list_reviews(books.connection, "bigint") == []
    assert run(books).drifted == 0


def test_an_ignored_component_stays_and_later_causes_are_corrected_beside_it(books: Books, mixed: int) -> None:
    by = {"by": "ann", "note": "a gift"}
    decide_drift(books.connection, mixed, "ignore", component=2, **by)
    (left,) = list_reviews(books.connection, "bigint")
    decide_drift(books.connection, left.id, "grant", component=1, reference="tx-1", **by)
    assert list_reviews(books.connection, "bigint") == []
    assert run(books).in_review == 0
    books.log_now(400)
    assert run(books).corrected == 1
    assert books.host.counter(books.user) == 30_777 - 400
    assert run(books).corrected == 0


def test_an_unknown_component_is_refused(books: Books, mixed: int) -> None:
    for component in (3, 99):
        with pytest.raises(DecisionRefusedError, match="no such component"):
            decide_drift(books.connection, mixed, "accept", component=component, by="ann", note="n")
    assert books.host.counter(books.user) == 30_777


@pytest.mark.parametrize("tokens", [20_000, 10_000])
def test_no_machine_no_bulk_decision_and_no_undo_takes_what_may_be_paid(books: Books, tokens: int) -> None:
    """Invariant I8. An amount of a plan's size, without any payment."""
    books.host.plan(20_000)
    books.host.execute("SET application_name = 'psql'")
    books.add(tokens)
    books.log_now(300)
    run(books)
    before = books.host.counter(books.user)
    assert before == 10_000 + tokens - 300
    chosen = choose_drifts(books.connection, "bigint", ReviewFilter(causes=("manual_edit",)))
    assert chosen.drifts == 1
    made = decide_chosen(books.connection, "bigint", chosen, "accept", by="ann", note="all edits")
    assert (made.decided, made.left) == (0, {"may_be_paid": 1})
    undo_run(books.connection, 2, "bigint", by="ann", note="n")
    run(books)
    assert books.host.counter(books.user) in (before, before + 300)
    (item,) = list_reviews(books.connection, "bigint")
    decide_drift(books.connection, item.id, "accept", by="ann", note="asked the user")
    assert books.host.counter(books.user) == 9_700


def test_the_story_of_a_counter_is_told_entry_by_entry(books: Books) -> None:
    books.host.execute("SET application_name = 'shop'")
    row = books.log_now(400)
    books.host.decrement(books.user, 400)
    missed = books.log_now(300)
    books.set(10_000)
    story = tell_story(books.connection, MAPPED, books.user, most=10)
    told = [one.sentence for one in story]
    assert f"10,000 → 9,600 by 'shop': subtracted the 400 tokens of log row {row}." in told
    assert any(
        one.startswith("9,600 → 10,000 by 'shop': the application wrote a value that it had read") for one in told
    )
    assert any(one.startswith(f"No change of the counter. log row {missed}: the host logged usage") for one in told)
    assert sum(one.tokens for one in story) == books.drift(0).surplus


def test_a_write_that_changed_nothing_is_found_by_one_run_and_not_again_by_the_next(books: Books) -> None:
    """A request reads the counter, another one of its size lowers it, and the first writes what it has already."""
    books.spend(280)
    books.row(280, books.host.value("SELECT clock_timestamp()"))
    books.log_now(280)
    books.row(280, books.host.value("SELECT clock_timestamp()"))
    held = Rules(min_age_seconds=0, policies={"stale_write": "review"})
    for _ in range(2):
        reconcile(books.host.engine, MAPPED, rules=held)
        assert parts(books) == [("stale_write", 280, "proven")]
    books.log_now(7)
    assert parts(books) == [("stale_write", 280, "proven"), ("missed_decrement", 7, "proven")]


def test_a_row_with_a_decrement_is_not_awaited_although_another_one_is(host: Host, connection: Connection) -> None:
    """The first run explains by rows, because no run has found the counter right since the journal began."""
    with host.engine.begin() as setup:
        install(setup, MAPPED, with_host_tables=True)
    books = Books(host, connection)
    books.use(400)
    books.spend(30)
    books.log_now(50)
    reconcile(host.engine, MAPPED, rules=Rules(min_age_seconds=600))
    assert rows(books)[-1][0] == "waiting"
    books.log_now(9)
    assert parts(books) == [("missed_decrement", 59, "proven")]
