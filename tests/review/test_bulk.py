"""Bulk decisions: in batches, each drift like a single one, and only drifts that were counted."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.sessions import locked, run_at_once
from trueup.database.engine import connect, get_engine
from trueup.errors import InvalidInputError
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.review import decisions
from trueup.review.decisions import (
    BulkDecision,
    ChosenDrifts,
    ReviewFilter,
    choose_drifts,
    decide_chosen,
    decide_drift,
    list_reviews,
    undo_run,
)
from trueup.settings.policies import Rules

RULES = Rules(min_age_seconds=0, policies={"missed_decrement": "review"})


def held(host: Host, *tokens: int) -> list[int]:
    """Users whose counters have missed a decrement of these tokens, which a run left for review."""
    users = [host.subscriber(10_000) for _ in tokens]
    for user, used in zip(users, tokens, strict=True):
        host.log(user, used, at=datetime.now(UTC))
    reconcile(get_engine(), HostMapping(), rules=RULES)
    return users


def choose(connection: Connection, limit: int = 100, **only: Any) -> ChosenDrifts:
    return choose_drifts(connection, "bigint", ReviewFilter(**only), limit=limit)


def decide(connection: Connection, chosen: ChosenDrifts, choice: Any = "accept", **more: Any) -> BulkDecision:
    return decide_chosen(connection, "bigint", chosen, choice, **{"by": "ann", "note": "a sample was fine", **more})


def counters(host: Host) -> list[int | None]:
    return list(host.execute("SELECT tokens_remaining FROM billing_subscription ORDER BY user_id").scalars())


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "DECIDED_AT_ONCE", 2)
    monkeypatch.setattr(decisions, "PAGE_SIZE", 3)


def test_many_drifts_are_accepted_in_batches_and_each_has_its_own_audit_row(host: Host, connection: Connection) -> None:
    held(host, *range(100, 107))
    chosen = choose(connection, causes=("missed_decrement",))
    assert (chosen.drifts, chosen.tokens_overstated, chosen.tokens_understated) == (7, 721, 0)
    seen: list[int] = []
    assert decide(connection, chosen, progress=seen.append) == BulkDecision(decided=7)
    assert seen == [2, 3, 5, 6, 7]
    assert counters(host) == list(range(9_900, 9_893, -1))
    rows = host.execute("SELECT * FROM trueup.drift_decision ORDER BY user_id").mappings().all()
    alone = {"decision": "accept", "decided_by": "ann", "note": "a sample was fine", "counter_before": 10_000}
    assert [{name: row[name] for name in alone} for row in rows] == [alone] * 7
    assert [row["counter_after"] for row in rows] == counters(host)
    assert_true(host)
    # A repeated call has nothing left to decide.
    assert choose(connection).drifts == 0
    assert decide(connection, choose(connection)) == BulkDecision()


def test_a_filter_selects_exactly_its_causes_sizes_and_run(host: Host, connection: Connection) -> None:
    host.plan(500)
    host.subscriber(10_000, counter=10_500)
    held(host, 100, 300)
    held(host, 200)

    def tokens(**only: Any) -> list[int]:
        items = list_reviews(connection, "bigint", only=ReviewFilter(**only))
        assert choose(connection, **only).drifts == len(items)
        return [item.tokens for item in items]

    assert tokens() == [500, 100, 300, 200]
    assert tokens(causes=("credit_without_grant",)) == [500]
    assert tokens(causes=("missed_decrement",), max_tokens=200) == [100, 200]
    assert tokens(run_id=1, max_tokens=300) == [100, 300]
    assert tokens(run_id=2) == [200]
    assert (
        tokens(causes=("missed_decrement", "credit_without_grant")) == tokens(run_id=3) == tokens(max_tokens=99) == []
    )
    assert choose(connection, limit=3).tokens_overstated == 900
    made = decide(connection, choose(connection, limit=3))
    # What may be paid is left for a decision about that drift alone.
    assert (made.decided, made.left) == (2, {"may_be_paid": 1})
    assert tokens() == [500, 200]


def test_a_filter_with_several_causes_selects_their_combination(host: Host, connection: Connection) -> None:
    held(host, 100, 200)
    host.execute("UPDATE trueup.drift SET cause = 'missed_decrement+manual_edit' WHERE observed - expected = 200")
    assert choose(connection, causes=("manual_edit", "missed_decrement")).tokens_overstated == 200
    assert choose(connection, causes=("missed_decrement",)).tokens_overstated == 100
    assert choose(connection, causes=("manual_edit",)).drifts == 0


def test_a_drift_that_has_changed_stays_undecided_and_is_counted(host: Host, connection: Connection) -> None:
    users = held(host, 100, 200, 300, 400, 500)
    chosen = choose(connection)
    host.decrement(users[0], 7)
    host.execute(
        f"ALTER TABLE billing_subscription ADD CONSTRAINT c CHECK (user_id <> {users[1]} OR tokens_remaining > 9900)"
    )
    decide_drift(connection, list_reviews(connection, "bigint")[4].id, "ignore", by="bob", note="n")
    with locked(host, "SELECT * FROM billing_subscription WHERE user_id = :user FOR UPDATE", user=users[2]):
        made = decide(connection, chosen)
    assert made == BulkDecision(decided=1, left={"changed": 1, "refused": 1, "busy": 1, "decided_otherwise": 1})
    assert counters(host) == [9_993, 10_000, 10_000, 9_600, 10_000]


def test_drifts_found_after_the_count_are_not_decided(host: Host, connection: Connection) -> None:
    held(host, 100)
    chosen = choose(connection)
    (later,) = held(host, 200)
    assert decide(connection, chosen) == BulkDecision(decided=1)
    assert host.counter(later) == 10_000


def test_each_drift_is_decided_once_by_concurrent_bulk_decisions(host: Host, connection: Connection) -> None:
    held(host, *range(100, 120))
    chosen = choose(connection)

    def accept() -> BulkDecision:
        with connect() as own:
            return decide(own, chosen)

    made = run_at_once([accept] * 3)
    assert all(one.decided + sum(one.left.values()) == 20 for one in made)
    assert host.value("SELECT count(*) FROM trueup.drift_decision") == 20
    assert_true(host)


def test_the_drifts_of_an_undone_run_can_be_accepted_in_bulk(host: Host, connection: Connection) -> None:
    for _ in range(5):
        host.log(host.subscriber(10_000), 300)
    rules = Rules(min_age_seconds=0)
    first = reconcile(get_engine(), HostMapping(), rules=rules).run_id
    assert first is not None
    undo_run(connection, first, "bigint", by="ann", note="wrong")
    second = reconcile(get_engine(), HostMapping(), rules=rules).run_id
    assert counters(host) == [10_000] * 5
    assert decide(connection, choose(connection, run_id=second)) == BulkDecision(decided=5)
    assert counters(host) == [9_700] * 5
    assert reconcile(get_engine(), HostMapping(), rules=rules).drifted == 0


def test_differences_are_ignored_in_bulk_too_but_grants_need_a_reference_each(
    host: Host, connection: Connection
) -> None:
    held(host, 100, 200)
    with pytest.raises(InvalidInputError, match="`trueup drift grant` for each one"):
        decide(connection, choose(connection), "grant")
    for wrong in ({"note": " "}, {"by": ""}):
        with pytest.raises(InvalidInputError):
            decide(connection, choose(connection), **wrong)
    assert decide(connection, choose(connection), "ignore") == BulkDecision(decided=2)
    assert counters(host) == [10_000] * 2
    assert reconcile(get_engine(), HostMapping(), rules=RULES).in_review == 0
