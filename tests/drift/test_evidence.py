"""The evidence from the host's rows, in a database with decrement rows and payments."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tests.support.host import START, Host
from tests.support.sessions import locked
from tests.support.two_books import DAY, HOUR, MAPPED, MINUTE, NOON, SECOND, Books
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.grants import grant_tokens, revoke_grant
from trueup.database.engine import get_engine
from trueup.drift.causes import Explanation
from trueup.drift.detect import find_drifts
from trueup.drift.explain import explain
from trueup.errors import NotInstalledError
from trueup.host.catalog import missing_host_columns, missing_host_tables
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile

pytestmark = pytest.mark.dated


def ids(explanation: Explanation) -> set[str]:
    """Return the ids of the rows that prove the first cause."""
    rows = explanation.components[0].evidence["rows"]
    return {row.get("log_id") or row["decrement_id"] for row in rows}


def test_a_log_row_without_a_decrement_is_a_missed_one(books: Books) -> None:
    books.use(300)
    row = books.log(300, NOON + DAY)
    explanation = books.explained()
    assert (explanation.cause, explanation.certainty, ids(explanation)) == ("missed_decrement", "inferred", {row})


def test_two_decrements_of_one_log_row_are_a_double_one(books: Books) -> None:
    log = books.log(300)
    first, second = books.lower(300), books.lower(300, NOON + 5 * MINUTE)
    explanation = books.explained()
    assert (explanation.cause, ids(explanation)) == ("double_decrement", {log, first, second})
    assert (explanation.certainty, explanation.alternatives) == ("possible", ("charged_not_logged",))


def test_a_decrement_far_from_any_log_row_of_its_size_was_not_logged(books: Books) -> None:
    books.use(200)
    row = books.lower(300)
    explanation = books.explained()
    assert (explanation.cause, explanation.certainty, ids(explanation)) == ("charged_not_logged", "inferred", {row})
    books.use(300, NOON + DAY)
    later = books.explained()
    assert (later.cause, later.certainty, later.alternatives) == (
        "charged_not_logged",
        "possible",
        ("double_decrement",),
    )


def test_a_failed_request_that_was_subtracted(books: Books) -> None:
    log = books.log(300, success=False)
    row = books.lower(300)
    explanation = books.explained()
    assert (explanation.cause, explanation.certainty, ids(explanation)) == (
        "failed_usage_charged",
        "inferred",
        {log, row},
    )


def test_two_decrements_of_one_failed_request_are_not_certain(books: Books) -> None:
    books.log(300, success=False)
    books.lower(300)
    books.lower(300, NOON + MINUTE)
    explanation = books.explained()
    assert (explanation.cause, explanation.certainty) == ("failed_usage_charged", "possible")
    assert explanation.alternatives == ("charged_not_logged", "double_decrement")


def test_a_decrement_after_a_failed_and_a_counted_row_belongs_to_the_row_before_it(books: Books) -> None:
    books.use(300)
    books.log(300, NOON + MINUTE, success=False)
    books.lower(300, NOON + MINUTE)
    explanation = books.explained()
    assert (explanation.cause, explanation.certainty) == ("failed_usage_charged", "possible")
    assert "double_decrement" in explanation.alternatives


def test_a_decrement_that_came_late_is_no_drift(books: Books) -> None:
    books.log(300)
    books.lower(300, NOON + 5 * HOUR)
    books.add(50)
    assert books.shares() == {"manual_edit": 50}


@pytest.mark.parametrize(("failed", "cause"), [(True, "failed_usage_charged"), (False, "charged_not_logged")])
def test_rows_of_one_size_days_apart_do_not_cancel(books: Books, failed: bool, cause: str) -> None:
    books.log(300)
    if failed:
        books.log(300, NOON + 3 * DAY, success=False)
    books.lower(300, NOON + 3 * DAY)
    books.log(40)
    assert books.shares() == {"missed_decrement": 340, cause: -300}


def test_the_counter_stopped_at_zero_before_a_purchase(books: Books) -> None:
    books.use(9_900)
    books.log(400, NOON + HOUR)
    row = books.lower(400, NOON + HOUR)
    payment = books.pay(books.host.plan(5_000), NOON + DAY)
    books.add(5_000)
    books.use(50, NOON + 2 * DAY)
    explanation = books.explained()
    assert [(part.cause, part.tokens) for part in explanation.components] == [
        ("clamped_at_zero", 300),
        ("credit_without_grant", 5_000),
    ]
    assert [found["id"] for found in explanation.components[0].evidence["rows"]] == [row]
    assert explanation.components[1].evidence["payments"][0]["id"] == payment


@pytest.mark.parametrize(
    ("own", "after", "status", "cause"),
    [
        (False, DAY, "completed", "credit_without_grant"),
        (True, DAY, "completed", "renewal_without_new_window"),
        # Not paid; or the purchase that began the period, whose tokens the counter began with.
        (False, DAY, "pending", "manual_edit"),
        (True, SECOND, "completed", "credited_twice"),
    ],
)
def test_a_purchase_that_no_plan_or_grant_includes(
    books: Books, own: bool, after: timedelta, status: str, cause: str
) -> None:
    books.use(300)
    plan = books.own_plan() if own else books.host.plan(5_000)
    books.pay(plan, START + after, status=status)
    books.add(10_000 if own else 5_000)
    assert books.shares() == {cause: 10_000 if own else 5_000}


def test_a_purchase_with_a_grant_is_no_cause(books: Books) -> None:
    books.pay(books.host.plan(5_000), NOON, reference="t9")
    books.host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, reference, granted_at) "
        "VALUES (:user, 5000, 'bought', 't9', :at)",
        user=books.user,
        at=NOON,
    )
    books.add(5_000)
    books.log(70)
    assert books.drift().evidence.purchases[0].granted
    assert books.shares() == {"missed_decrement": 70}


@pytest.mark.parametrize("mapping", [MAPPED, HostMapping()])
def test_a_grant_that_begins_and_ends_is_followed_by_the_counter(books: Books, mapping: HostMapping) -> None:
    with books.host.engine.begin() as connection:
        install(connection, mapping, with_host_tables=False)
    books.use(300)
    grant = grant_tokens(books.connection, books.user, 500, reason="r", reference="r", by="ann")
    assert books.shares() == {"grant_not_in_counter": -500}
    run()
    assert books.host.counter(books.user) == 10_200
    revoke_grant(books.connection, books.user, grant.id, reason="r", by="ann")
    assert books.shares() == {"grant_not_in_counter": 500}
    run()
    assert books.host.counter(books.user) == 9_700


def test_a_grant_that_continues_in_a_new_period(books: Books) -> None:
    grant_tokens(books.connection, books.user, 500, reason="r", reference="r", by="ann")
    run()
    books.host.execute("UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = 10000")
    assert books.shares() == {"grant_not_in_counter": -500}


@pytest.mark.parametrize("paid", [True, False])
def test_an_upgrade_that_kept_the_old_tokens(books: Books, paid: bool) -> None:
    before = books.host.plan(3_000)
    if paid:
        books.pay(before, START - 9 * DAY, reference="t0")
    books.log(1_000, START - 2 * DAY)
    books.row(1_000, START - 2 * DAY)
    books.pay(books.own_plan(), START + SECOND)
    books.add(2_000)
    explanation = books.explained()
    assert (explanation.cause, explanation.components[0].tokens) == ("carried_over_tokens", 2_000)
    assert explanation.components[0].evidence["before"]["used"] == 1_000


def test_young_usage_is_in_flight_and_no_cause(books: Books) -> None:
    books.use(300)
    now = books.connection.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(now, datetime)
    books.log(200, now)
    books.log(40)
    explanation = books.explained()
    assert (explanation.cause, explanation.in_flight, explanation.certainty) == ("missed_decrement", 200, "inferred")
    assert explanation.components[0].tokens == 40
    assert explain(books.drift(0), plan_sizes=frozenset(), counter_limit=2**31 - 1, now=NOON).in_flight == 0


def test_a_charge_that_did_not_lower_the_counter_is_known(books: Books) -> None:
    hold = hold_tokens(books.connection, books.user)
    charge_tokens(books.connection, hold, 100, key="free")
    with locked(books.host, "SELECT * FROM billing_subscription FOR UPDATE"):
        charge_tokens(books.connection, hold, 300, key="locked")
    lowered = books.host.execute("SELECT call_key, counter_lowered FROM trueup.charge ORDER BY 1").all()
    assert [tuple(row) for row in lowered] == [("free", True), ("locked", False)]
    explanation = books.explained()
    assert (explanation.cause, explanation.components[0].tokens) == ("missed_decrement", 300)
    assert explanation.components[0].evidence["by"] == "trueup: the counter was locked"
    assert books.drift(0).evidence.parts == [], "our own log rows need no decrement row"
    assert books.drift().evidence.concurrent == [], "only what was subtracted can be lost"


@pytest.mark.parametrize("counter", [0, None, -5])
def test_a_charge_is_not_missing_in_an_empty_counter(books: Books, counter: int | None) -> None:
    books.host.execute("UPDATE billing_subscription SET tokens_remaining = :counter", counter=counter)
    charge_tokens(books.connection, hold_tokens(books.connection, books.user), 300)
    assert books.host.value("SELECT counter_lowered FROM trueup.charge")
    assert books.host.counter(books.user) == counter


# --- The base point: when a counter was last right ----------------------------------------------------------------


def run(**more: Any) -> None:
    reconcile(get_engine(), MAPPED, **more)


def test_rows_before_a_correction_explain_nothing_again(books: Books) -> None:
    books.log(300)
    run()
    assert books.host.counter(books.user) == 9_700
    now = books.connection.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(now, datetime)
    books.add(300)
    drift = books.drift()
    assert (drift.evidence.base.kind, drift.evidence.base.written) == ("correction", 9_700)
    assert "missed_decrement" not in books.shares()


def test_an_undone_correction_is_no_base_point(books: Books) -> None:
    books.log(300)
    run()
    books.host.execute(
        "INSERT INTO trueup.drift_decision (user_id, drift_id, decision, decided_by, note, decided_at) "
        "SELECT user_id, id, 'undo', 'me', '', now() FROM trueup.drift"
    )
    books.add(300)
    assert books.drift().evidence.base.kind == "window"
    assert books.shares() == {"missed_decrement": 300}


@pytest.mark.parametrize(("only", "kind"), [(False, "run"), (True, "window")])
def test_a_full_run_without_drift_is_a_base_point(books: Books, only: bool, kind: str) -> None:
    books.use(300)
    run(**({"only_user": books.user} if only else {}))
    books.add(50)
    assert books.drift().evidence.base.kind == kind


def test_the_run_before_the_first_drift_is_the_base_point(books: Books) -> None:
    run()
    first = books.host.value("SELECT started_at FROM trueup.reconcile_run")
    books.add(50)
    for _ in range(3):
        run()
    assert [tuple(row) for row in books.host.execute("SELECT run_id, last_run_id FROM trueup.drift")] == [(2, 4)]
    base = books.drift().evidence.base
    assert (base.kind, datetime.fromisoformat(base.at or "")) == ("run", first)


def test_a_host_that_writes_back_the_value_from_before_a_correction(books: Books) -> None:
    books.log(300)
    run()
    books.add(300)
    explanation = books.explained()
    assert (explanation.cause, explanation.components[0].tokens) == ("lost_update", 300)


# --- Invalid rows, and hosts without the tables -------------------------------------------------------------------


def test_invalid_rows_stop_no_run(books: Books) -> None:
    host = books.host
    host.execute("ALTER TABLE ai_usage_log ALTER total_tokens DROP NOT NULL, ALTER success DROP NOT NULL")
    host.execute("ALTER TABLE ai_usage_log ALTER total_tokens TYPE bigint")
    host.execute("ALTER TABLE billing_tokenusage ALTER used_tokens DROP NOT NULL, ALTER usage_date DROP NOT NULL")
    host.execute("ALTER TABLE billing_tokenusage ALTER used_tokens TYPE bigint")
    for tokens, at in ((None, NOON), (-70, NOON), (2**40, NOON), (33, NOON + 9_000 * DAY), (0, NOON)):
        books.log(tokens, at)
        books.log(tokens, at, success=False)
        books.row(tokens, at)
    host.execute("UPDATE ai_usage_log SET success = NULL WHERE total_tokens = -70 AND NOT success")
    for at in ("infinity", "-infinity", "4714-11-24 BC", "294276-12-31 23:59:59"):
        host.execute(
            "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) "
            "VALUES (:user, 'chat', 5, CAST(:at AS timestamptz))",
            user=books.user,
            at=at,
        )
        host.execute(
            "INSERT INTO billing_tokenusage (subscription_id, used_tokens, usage_date) "
            "SELECT id, 6, CAST(:at AS timestamptz) FROM billing_subscription",
            at=at,
        )
        host.execute(
            "INSERT INTO billing_payment (user_id, status, payment_date) "
            "VALUES (:user, 'completed', CAST(:at AS timestamptz))",
            user=books.user,
            at=at,
        )
    assert books.drift().surplus != 0
    books.explained()


@pytest.mark.parametrize("start", ["-infinity", "infinity", "4713-01-01 BC", "200000-01-01"])
def test_odd_periods_stop_no_run(books: Books, start: str) -> None:
    books.use(300)
    books.host.execute("UPDATE billing_subscription SET start_date = CAST(:start AS timestamptz)", start=start)
    books.pay(books.own_plan(), NOON)
    books.add(51)
    assert "manual_edit" in books.explained().cause


def test_many_missed_decrements_are_counted_and_a_few_are_shown(books: Books) -> None:
    for number in range(30):
        books.log(100 + number, NOON + number * MINUTE)
    (part,) = books.explained().components
    assert (part.cause, part.tokens, part.evidence["count"]) == ("missed_decrement", sum(range(100, 130)), 30)
    assert len(part.evidence["rows"]) <= 8


def test_the_log_is_read_only_for_drifted_users_since_their_base_points(books: Books) -> None:
    other = Books(books.host, books.connection)
    for used in (books, other):
        used.use(300)
    run()
    for minutes in range(20):
        other.use(100 + minutes, datetime.now(UTC))
    run()
    other.add(7)
    assert rows_read(books, [books.user]) == 0
    assert rows_read(books, [books.user, other.user]) == 20


def rows_read(books: Books, users: list[int]) -> int:
    """Find drifts in a new transaction. Returns how many log rows were read by index."""
    with books.host.engine.begin() as connection:
        find_drifts(connection, users, "bigint")
        read: int = connection.scalar(
            text(
                "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables "
                "WHERE relname = 'ai_usage_log'"
            )
        )
        return read


@pytest.mark.parametrize(
    ("mapping", "cause"),
    [
        (HostMapping(), "missed_decrement"),
        (HostMapping(payment=MAPPED.payment), "missed_decrement"),
        (HostMapping(token_usage=MAPPED.token_usage), "missed_decrement"),
        (MAPPED, "missed_decrement"),
    ],
)
def test_each_optional_table_may_be_mapped_without_the_other(books: Books, mapping: HostMapping, cause: str) -> None:
    with books.host.engine.begin() as connection:
        install(connection, mapping, with_host_tables=False)
    books.use(200)
    books.log(300)
    explanation = books.explained()
    assert explanation.cause == cause
    assert explanation.certainty == ("inferred" if mapping.token_usage.table else "possible")


def test_without_the_tables_a_row_and_a_purchase_are_found_by_their_sizes(books: Books) -> None:
    with books.host.engine.begin() as connection:
        install(connection, HostMapping(payment=MAPPED.payment), with_host_tables=False)
    books.pay(books.host.plan(5_000), NOON)
    books.add(5_000)
    assert (books.explained().cause, books.explained().certainty) == ("credit_without_grant", "possible")
    books.log(300)
    assert books.shares() == {"credit_without_grant": 5_000, "missed_decrement": 300}
    assert books.explained().certainty == "possible"


def test_missing_mapped_tables_and_columns_are_named(host: Host) -> None:
    with host.engine.begin() as connection:
        assert missing_host_tables(connection, MAPPED) == ["billing_tokenusage", "billing_payment"]
        with pytest.raises(NotInstalledError, match="billing_tokenusage, billing_payment"):
            install(connection, MAPPED, with_host_tables=False)
    with host.engine.begin() as connection:
        install(connection, MAPPED, with_host_tables=True)
        connection.execute(text("ALTER TABLE billing_tokenusage DROP COLUMN usage_date"))
        connection.execute(text("ALTER TABLE billing_payment DROP COLUMN status"))
        assert missing_host_columns(connection, MAPPED) == [
            "billing_tokenusage.usage_date",
            "billing_payment.status",
        ]


def test_a_pack_that_was_credited_twice_has_its_own_cause_without_the_journal(books: Books) -> None:
    books.pay(books.host.plan(5_000), NOON)
    books.use(400)
    books.add(5_000)
    books.add(5_000)
    books.log(300, NOON + HOUR)
    assert books.shares() == {"credit_without_grant": 5_000, "credited_twice": 5_000, "missed_decrement": 300}
    twice = next(part for part in books.explained().components if part.cause == "credited_twice")
    assert (twice.certainty, twice.evidence["payments"][0]["reference"]) == ("possible", "t1")
