from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true, dump
from tests.support.host import START, Host
from tests.support.sessions import locked, run_at_once
from trueup.accounts.account import read_account
from trueup.database.engine import connect, get_engine
from trueup.errors import InvalidInputError
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.review.decisions import (
    Decision,
    DecisionRefusedError,
    ReviewItem,
    Undone,
    decide_drift,
    list_reviews,
    undo_run,
)
from trueup.settings.policies import Rules

pytestmark = pytest.mark.dated

LATER = timedelta(hours=2)


@pytest.fixture
def run(host: Host) -> Callable[..., RunSummary]:
    def run(**more: Any) -> RunSummary:
        return reconcile(get_engine(), HostMapping(), **more)

    return run


@pytest.fixture
def decide(connection: Connection) -> Callable[..., Decision]:
    def decide(drift: int, choice: Any = "accept", **more: Any) -> Decision:
        return decide_drift(connection, drift, choice, **{"by": "ann", "note": "looked at it", **more})

    return decide


def credited(host: Host, credit: int = 500, used: int = 600) -> int:
    """A user whose counter shows more tokens than remain, as after buying a pack."""
    user = host.subscriber(10_000)
    host.log(user, used)
    host.decrement(user, used)
    host.execute(
        "UPDATE billing_subscription SET tokens_remaining = tokens_remaining + :credit WHERE user_id = :user",
        credit=credit,
        user=user,
    )
    return user


def reviews(connection: Connection) -> list[ReviewItem]:
    return list_reviews(connection, "bigint")


@pytest.fixture
def drift(host: Host, connection: Connection, run: Callable[..., RunSummary]) -> ReviewItem:
    """A drift in review, with a counter 500 tokens too high."""
    host.plan(500)
    credited(host)
    run()
    (item,) = reviews(connection)
    return item


def decisions(host: Host) -> list[tuple[Any, ...]]:
    rows = host.execute(
        "SELECT drift_id, decision, decided_by, note, counter_before, counter_after, grant_id "
        "FROM trueup.drift_decision ORDER BY id"
    )
    return [tuple(row) for row in rows]


def test_a_drift_in_review_is_listed_with_what_each_choice_would_do(drift: ReviewItem) -> None:
    assert (drift.tokens, drift.counter, drift.expected, drift.changed) == (500, 9_900, 9_400, False)
    assert (drift.cause, drift.tokens_to_grant) == ("credit_without_grant", 500)
    assert drift.found_at <= drift.last_seen_at
    assert drift.evidence["components"][0]["tokens"] == 500


def test_the_same_drift_is_not_written_again(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary]
) -> None:
    before = host.value("SELECT count(*) FROM trueup.drift")
    summary = run()
    assert (summary.drifted, summary.found_new, summary.in_review) == (1, 0, 1)
    assert host.value("SELECT count(*) FROM trueup.drift") == before
    (item,) = reviews(connection)
    assert (item.id, item.run_id) == (drift.id, drift.run_id)
    assert item.last_seen_at > drift.last_seen_at
    assert host.value("SELECT last_run_id FROM trueup.drift") == summary.run_id
    assert host.execute("SELECT found_new, in_review FROM trueup.reconcile_run ORDER BY id").all() == [(1, 1), (0, 1)]


def test_a_user_with_new_usage_stays_in_the_same_review(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    host.log(drift.user_id, 100)  # type: ignore[arg-type]
    host.decrement(drift.user_id, 100)  # type: ignore[arg-type]
    assert run().found_new == 0
    (item,) = reviews(connection)
    assert (item.id, item.tokens, item.counter, item.expected, item.changed) == (drift.id, 500, 9_800, 9_300, False)
    assert decide(item.id).counter_after == 9_300


def test_another_difference_is_another_drift(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    host.execute("UPDATE billing_subscription SET tokens_remaining = 10007")
    (item,) = reviews(connection)
    assert item.changed
    with pytest.raises(DecisionRefusedError, match="counter is now 10007 and should be 9400"):
        decide(drift.id)
    assert run().found_new == 1
    (item,) = reviews(connection)
    assert item.id != drift.id
    with pytest.raises(DecisionRefusedError, match=f"drift {item.id} of user"):
        decide(drift.id)
    assert decisions(host) == []


def test_a_drift_that_disappeared_is_not_listed_and_is_new_if_it_returns(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary]
) -> None:
    host.execute("UPDATE billing_subscription SET tokens_remaining = 9400")
    run()
    assert reviews(connection) == []
    host.execute("UPDATE billing_subscription SET tokens_remaining = 9900")
    assert run().found_new == 1


def test_accept_corrects_the_counter_and_records_who_and_why(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    done = decide(drift.id, by="ann", note="refunded")
    assert (done.counter_before, done.counter_after, done.already) == (9_900, 9_400, False)
    assert host.counter(drift.user_id) == 9_400  # type: ignore[arg-type]
    assert decisions(host) == [(drift.id, "accept", "ann", "refunded", 9_900, 9_400, None)]
    assert reviews(connection) == []
    assert run().drifted == 0


def test_grant_makes_the_counter_right_without_touching_it(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    done = decide(drift.id, "grant", note="pack bought", reference="tx-1")
    assert (done.counter_before, done.counter_after, done.tokens_granted) == (9_900, 9_900, 500)
    assert decisions(host) == [(drift.id, "grant", "ann", "pack bought", 9_900, 9_900, done.grant_id)]
    assert host.execute("SELECT tokens, reason, reference, granted_by FROM trueup.token_grant").one() == (
        500,
        "pack bought",
        "tx-1",
        "ann",
    )
    assert (read_account(connection, drift.user_id).remaining, host.counter(drift.user_id)) == (9_900, 9_900)  # type: ignore[arg-type]
    assert run().drifted == 0
    assert_true(host)


def test_a_grant_includes_the_users_overdraft(
    host: Host, connection: Connection, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    host.plan(500)
    user = credited(host, credit=500, used=10_200)
    run()
    (item,) = reviews(connection)
    assert (item.tokens, item.tokens_to_grant) == (500, 700)
    assert decide(item.id, "grant", reference="tx").tokens_granted == 700
    assert read_account(connection, user).remaining == host.counter(user) == 500
    assert run().drifted == 0


def test_a_grant_needs_a_reference_that_has_granted_nothing(
    host: Host, drift: ReviewItem, decide: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidInputError, match="reference"):
        decide(drift.id, "grant")
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, reference, expires_at) "
        "VALUES (:user, 500, 'old', 'tx-1', now() - interval '1 day')",
        user=drift.user_id,
    )
    before = dump(host)
    with pytest.raises(DecisionRefusedError, match="'tx-1' was granted before"):
        decide(drift.id, "grant", reference="tx-1")
    with pytest.raises(DecisionRefusedError, match="expired"):
        decide(drift.id, "grant", reference="tx-2", expires_at=START)
    assert dump(host)["trueup.token_grant"] == before["trueup.token_grant"]
    assert decisions(host) == []
    expires = datetime.now(UTC) + timedelta(days=30)
    decide(drift.id, "grant", reference="tx-2", expires_at=expires)
    assert host.value("SELECT max(expires_at) FROM trueup.token_grant") == expires


def test_a_counter_that_is_too_low_has_nothing_to_grant(
    host: Host, connection: Connection, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    user = host.subscriber(10_000, counter=9_000)
    run(rules=Rules(max_correction=10))
    (item,) = reviews(connection)
    assert (item.tokens, item.tokens_to_grant) == (-1_000, None)
    with pytest.raises(DecisionRefusedError, match="nothing to grant"):
        decide(item.id, "grant", reference="x")
    decide(item.id)
    assert host.counter(user) == 10_000


def test_an_ignored_difference_is_not_raised_again_while_it_stays_the_same(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    decide(drift.id, "ignore", note="ours")
    assert reviews(connection) == []
    host.log(drift.user_id, 50)  # type: ignore[arg-type]
    host.decrement(drift.user_id, 50)  # type: ignore[arg-type]
    for _ in range(2):
        summary = run()
        assert (summary.drifted, summary.found_new, summary.in_review) == (1, 0, 0)
    host.execute("UPDATE billing_subscription SET tokens_remaining = tokens_remaining + 500")
    assert run().in_review == 1
    host.execute("UPDATE billing_subscription SET tokens_remaining = tokens_remaining - 500")
    summary = run()
    assert (summary.found_new, summary.in_review) == (1, 0)
    assert host.value("SELECT action FROM trueup.drift ORDER BY id DESC LIMIT 1") == "ignored"
    assert run().found_new == 0


def test_ignored_and_undone_drifts_are_settled_when_the_window_changes(
    host: Host, connection: Connection, drift: ReviewItem, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    decide(drift.id, "ignore")
    host.execute("UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = 10500")
    assert run().in_review == 1


@pytest.mark.parametrize("choice", ["accept", "grant", "ignore"])
def test_a_repeated_decision_is_made_once_and_another_decision_is_refused(
    host: Host, drift: ReviewItem, decide: Callable[..., Any], choice: str
) -> None:
    more = {"reference": "tx"} if choice == "grant" else {}
    first = decide(drift.id, choice, by="ann", **more)
    again = decide(drift.id, choice, by="bob", **more)
    assert (again.already, again.by, again.decided_at) == (True, "ann", first.decided_at)
    other = "ignore" if choice == "accept" else "accept"
    with pytest.raises(DecisionRefusedError, match=f"ann decided '{choice}'"):
        decide(drift.id, other)
    assert len(decisions(host)) == 1


def test_one_of_several_concurrent_decisions_wins(host: Host, drift: ReviewItem) -> None:
    def decider(number: int) -> Callable[[], str]:
        def decide() -> str:
            choice: Any = ("accept", "ignore", "grant")[number % 3]
            with connect() as connection:
                try:
                    done = decide_drift(connection, drift.id, choice, by=f"p{number}", note="n", reference=f"r{number}")
                except DecisionRefusedError as error:
                    return str(error)
                return f"{done.choice} {done.already} {done.by}"

        return decide

    answers = run_at_once([decider(number) for number in range(5)])
    ((_, choice, by, *_),) = decisions(host)
    assert f"{choice} False {by}" in answers
    assert sum(" False " in answer for answer in answers) == 1
    assert host.value("SELECT count(*) FROM trueup.token_grant") == (choice == "grant")


def test_a_counter_that_the_host_is_writing_is_not_waited_for(
    host: Host, drift: ReviewItem, decide: Callable[..., Any]
) -> None:
    with (
        locked(host, "SELECT * FROM billing_subscription FOR UPDATE"),
        pytest.raises(DecisionRefusedError, match="writing this counter now"),
    ):
        decide(drift.id)
    assert decide(drift.id).counter_after == 9_400


def test_a_drift_of_a_deleted_subscription_cannot_be_decided(
    host: Host, drift: ReviewItem, decide: Callable[..., Any]
) -> None:
    host.execute("DELETE FROM billing_subscription")
    with pytest.raises(DecisionRefusedError, match="no longer has this subscription"):
        decide(drift.id)


def test_a_drift_that_is_not_in_review_cannot_be_decided(
    host: Host, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    host.log(host.subscriber(10_000), 300)
    run()
    corrected = host.value("SELECT id FROM trueup.drift")
    with pytest.raises(DecisionRefusedError, match="its action was 'corrected'"):
        decide(corrected)
    with pytest.raises(DecisionRefusedError, match="it does not exist"):
        decide(corrected + 1)
    for wrong in ({"note": " "}, {"by": ""}, {"note": "a\x00"}):
        with pytest.raises(InvalidInputError):
            decide(corrected, **wrong)


def test_a_null_counter_held_for_review_is_accepted(
    host: Host, connection: Connection, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    user = host.subscriber(10_000, counter=None)
    run(rules=Rules(policies={"counter_null": "review"}))
    (item,) = reviews(connection)
    done = decide(item.id)
    assert (done.counter_before, done.counter_after, host.counter(user)) == (None, 10_000, 10_000)


def test_undo_restores_counters_that_were_not_written_since(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    users = [host.subscriber(10_000, counter=counter) for counter in (9_000, None, 9_300, 8_000)]
    first = run().run_id
    assert first is not None
    host.decrement(users[2], 5)
    before = [host.counter(user) for user in users]
    assert before == [10_000, 10_000, 9_995, 10_000]
    with locked(host, "SELECT * FROM billing_subscription WHERE user_id = :user FOR UPDATE", user=users[3]):
        assert undo_run(connection, first, "bigint", by="ann", note="wrong plan", batch_size=2) == Undone(
            counters=2, left=2
        )
    assert [host.counter(user) for user in users] == [9_000, None, 9_995, 10_000]
    assert [row[1:6] for row in decisions(host)] == [
        ("undo", "ann", "wrong plan", 10_000, 9_000),
        ("undo", "ann", "wrong plan", 10_000, None),
    ]
    # A repeated call undoes the counter that was locked, and nothing twice.
    assert undo_run(connection, first, "bigint", by="bob", note="again") == Undone(counters=1, left=1)
    assert undo_run(connection, first, "bigint", by="bob", note="again") == Undone(counters=0, left=1)


def test_an_undone_correction_stays_in_review_after_later_changes(
    host: Host, connection: Connection, run: Callable[..., RunSummary], decide: Callable[..., Any]
) -> None:
    user = host.subscriber(10_000)
    host.log(user, 300)
    first = run().run_id
    assert first is not None
    undo_run(connection, first, "bigint", by="ann", note="n")
    host.log(user, 40)
    for _ in range(2):
        assert run().corrected == 0
    assert host.counter(user) == 10_000
    (item,) = reviews(connection)
    assert item.tokens == 340
    assert "undid" in item.reason
    decide(item.id)
    assert host.counter(user) == 9_660
    host.log(user, 25, at=datetime.now(UTC))
    assert run(rules=Rules(min_age_seconds=0)).corrected == 1


def test_a_correction_followed_by_another_correction_is_not_undone(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    user = host.subscriber(10_000, counter=9_000)
    first = run().run_id
    assert first is not None
    host.log(user, 500, at=host.value("SELECT clock_timestamp()"))
    run(rules=Rules(min_age_seconds=0))
    assert host.counter(user) == 9_500
    assert undo_run(connection, first, "bigint", by="ann", note="n") == Undone(counters=0, left=1)


def test_only_an_ended_run_can_be_undone(host: Host, connection: Connection, run: Callable[..., RunSummary]) -> None:
    with pytest.raises(DecisionRefusedError, match="Run 1 does not exist"):
        undo_run(connection, 1, "bigint", by="ann", note="n")
    run()
    host.execute("UPDATE trueup.reconcile_run SET status = 'running', finished_at = NULL")
    with pytest.raises(DecisionRefusedError, match="still in progress"):
        undo_run(connection, 1, "bigint", by="ann", note="n")


def test_a_dry_run_reports_known_drifts_and_writes_nothing(
    host: Host, drift: ReviewItem, run: Callable[..., RunSummary]
) -> None:
    before = dump(host)
    summary = run(dry_run=True, keep_findings=True)
    assert dump(host) == before
    assert [(finding.action, finding.is_new) for finding in summary.findings] == [("review", False)]


def test_a_decrement_in_flight_is_waited_for_and_corrected_if_it_never_arrives(
    host: Host, run: Callable[..., RunSummary]
) -> None:
    user = host.subscriber(10_000)
    host.log(user, 300, at=datetime.now(UTC))
    for new in (1, 0):
        summary = run()
        assert (summary.drifted, summary.corrected, summary.found_new) == (1, 0, new)
    assert host.value("SELECT action FROM trueup.drift") == "waiting"
    assert host.counter(user) == 10_000
    # A row dated in the future stays new for long. A decrement that has not arrived by then counts as missed.
    host.execute("UPDATE ai_usage_log SET created_at = now() + interval '1 hour'")
    host.execute("UPDATE trueup.drift SET found_at = found_at - interval '61 seconds'")
    run(rules=Rules(min_age_seconds=60))
    assert host.counter(user) == 9_700
