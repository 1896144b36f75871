from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true, dump
from tests.support.host import START, Host
from tests.support.sessions import impatient, locked, locked_balance
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary

YESTERDAY = START - timedelta(days=1)


@pytest.fixture
def run(host: Host) -> Callable[..., RunSummary]:
    def run(**more: Any) -> RunSummary:
        return reconcile(get_engine(), HostMapping(), **more)

    return run


def drifts(host: Host) -> list[tuple[int, str, str, int | None, int, int | None]]:
    rows = host.execute("SELECT user_id, cause, action, observed, expected, written FROM trueup.drift ORDER BY id")
    return [tuple(row) for row in rows]


def missed(host: Host, used: int = 300) -> int:
    """A user whose row was logged and never subtracted from the counter."""
    user = host.subscriber(10_000)
    host.log(user, used)
    return user


def test_correct_counters_are_not_changed(host: Host, run: Callable[..., RunSummary]) -> None:
    user = missed(host)
    host.decrement(user, 300)
    before = dump(host)["public.billing_subscription"]
    summary = run()
    assert (summary.checked, summary.drifted, summary.corrected) == (1, 0, 0)
    assert dump(host)["public.billing_subscription"] == before
    assert drifts(host) == []


def test_a_missed_decrement_is_corrected(host: Host, run: Callable[..., RunSummary]) -> None:
    user = missed(host)
    summary = run()
    assert (summary.corrected, summary.tokens_overstated, summary.tokens_understated) == (1, 300, 0)
    assert host.counter(user) == 9_700
    assert drifts(host) == [(user, "missed_decrement", "corrected", 10_000, 9_700, 9_700)]
    evidence = host.value("SELECT evidence FROM trueup.drift")
    assert evidence["components"][0]["newest"][0]["log_id"] == str(host.value("SELECT id FROM ai_usage_log"))
    assert run().drifted == 0


@pytest.mark.parametrize(
    ("spoil", "cause", "action", "counter"),
    [
        ("UPDATE billing_subscription SET tokens_remaining = NULL", "counter_null", "corrected", 9_700),
        ("UPDATE billing_subscription SET tokens_remaining = -4", "counter_negative", "review", -4),
        ("UPDATE billing_subscription SET tokens_remaining = 9400", "double_decrement", "corrected", 9_700),
        ("UPDATE billing_subscription SET tokens_remaining = 9650", "failed_usage_charged", "corrected", 9_700),
        # There was usage before the window, so an upgrade may have kept tokens.
        ("UPDATE billing_subscription SET tokens_remaining = 9701", "unexplained", "review", 9_701),
        ("UPDATE billing_subscription SET tokens_remaining = 9770", "unexplained", "review", 9_770),
        ("UPDATE billing_subscription SET tokens_remaining = 19700", "credit_without_grant", "review", 19_700),
        ("UPDATE billing_subscription SET tokens_remaining = 10001", "credit_without_grant", "review", 10_001),
        (
            "UPDATE billing_subscription SET tokens_remaining = 0, is_active = false",
            "burned_at_expiry",
            "reported",
            0,
        ),
    ],
)
def test_each_cause_is_found_from_the_rows_and_handled_as_its_policy_says(
    host: Host, run: Callable[..., RunSummary], spoil: str, cause: str, action: str, counter: int
) -> None:
    user = missed(host)
    host.log(user, 50, success=False)
    host.log(user, 70, at=YESTERDAY)
    host.execute(spoil)
    run()
    assert host.counter(user) == counter
    ((_, found, done, _, expected, written),) = drifts(host)
    assert (found, done, expected, written) == (cause, action, 9_700, 9_700 if action == "corrected" else None)


def test_a_tokens_pack_of_a_plans_size_is_never_taken_away(host: Host, run: Callable[..., RunSummary]) -> None:
    host.plan(500)
    user = missed(host, 600)
    host.decrement(user, 600)
    host.execute("UPDATE billing_subscription SET tokens_remaining = tokens_remaining + 500")
    for _ in range(2):
        run()
        assert host.counter(user) == 9_900


@pytest.mark.parametrize(("plan", "counter"), [(2**31 - 1, 2**31 - 1), (2**31 - 1, None), (2**31 - 1, 5)])
def test_a_counter_may_be_set_to_the_largest_value_of_its_column(
    host: Host, run: Callable[..., RunSummary], plan: int, counter: int | None
) -> None:
    user = host.subscriber(plan, counter=counter)
    run()
    assert host.counter(user) == plan


def test_a_counter_whose_column_is_too_small_for_what_remains_is_only_reported(
    host: Host, run: Callable[..., RunSummary]
) -> None:
    user = host.subscriber(2**31 - 1)
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_at) VALUES (:u, 1, 'x', :at)",
        u=user,
        at=START,
    )
    other = missed(host)
    run()
    assert drifts(host)[0] == (user, "counter_out_of_range", "reported", 2**31 - 1, 2**31, None)
    assert (host.counter(user), host.counter(other)) == (2**31 - 1, 9_700)


def test_a_charge_that_could_not_lower_the_counter_is_corrected_later(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    user = host.subscriber(10_000)
    with locked(host, "SELECT * FROM billing_subscription FOR UPDATE"):
        charge_tokens(connection, hold_tokens(connection, user), 300)
    run()
    assert host.counter(user) == 9_700
    assert drifts(host)[0][1:3] == ("missed_decrement", "corrected")


def before_correction(act: Callable[[], None]) -> Callable[[Any], None]:
    """Let the host act once, immediately before trueup sends its correction."""
    acted = []

    def listen(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "correct_counters" in statement and not acted:
            acted.append(True)
            act()

    return lambda engine: event.listen(engine, "before_cursor_execute", listen)


def test_a_counter_that_the_host_wrote_meanwhile_is_not_overwritten(host: Host, run: Callable[..., RunSummary]) -> None:
    user, other = missed(host), missed(host)
    before_correction(lambda: (host.log(user, 1), host.decrement(user, 1)))(get_engine())
    summary = run()
    assert (host.counter(user), host.counter(other)) == (9_999, 9_700)
    assert summary.corrected == 1
    assert [row[:3] + row[5:] for row in drifts(host)] == [
        (user, "missed_decrement", "lost_race", None),
        (other, "missed_decrement", "corrected", 9_700),
    ]
    run()
    assert host.counter(user) == 9_699


def test_a_subscription_deleted_meanwhile_is_a_lost_race(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)
    before_correction(lambda: host.execute("DELETE FROM billing_subscription"))(get_engine())
    run()
    assert [row[2] for row in drifts(host)] == ["lost_race"]


def test_a_row_that_the_host_has_locked_is_skipped(host: Host, run: Callable[..., RunSummary]) -> None:
    user, other = missed(host), missed(host)
    with locked(host, "SELECT * FROM billing_subscription WHERE user_id = :user FOR UPDATE", user=user):
        run()
        assert [row[2] for row in drifts(host)] == ["lost_race", "corrected"]
    assert (host.counter(user), host.counter(other)) == (10_000, 9_700)
    run()
    assert host.counter(user) == 9_700


def test_a_locked_balance_is_skipped_and_its_counter_is_still_compared(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    user, other = missed(host), missed(host)
    hold_tokens(connection, user, 0)
    host.log(user, 40)
    host.decrement(user, 40)
    with locked_balance(host, user), impatient(host) as session:
        reconcile(_engine_that_wont_wait(), HostMapping())
        session.execute(text("SELECT 1"))
    assert (host.counter(user), host.counter(other)) == (9_660, 9_700)
    assert_true(host)


def _engine_that_wont_wait() -> Any:
    return create_engine(get_engine().url, poolclass=NullPool, connect_args={"options": "-c lock_timeout=100ms"})


def test_no_host_row_stays_locked_between_two_statements(host: Host, run: Callable[..., RunSummary]) -> None:
    """A paused or cut-off worker must not leave the host waiting for a lock."""
    missed(host)
    refused = []

    def host_writes(*_: Any) -> None:
        try:
            with impatient(host) as session:
                session.execute(text("UPDATE billing_subscription SET status = 'seen'"))
        except Exception as error:  # noqa: BLE001 - reported below
            refused.append(error)

    engine = get_engine()
    event.listen(engine, "before_cursor_execute", host_writes)
    event.listen(engine, "commit", host_writes)
    run()
    assert not refused


def test_a_dry_run_writes_nothing_and_reports_everything(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    user = missed(host)
    hold_tokens(connection, user, 5)
    host.log(user, 20)
    host.decrement(user, 20)
    before = dump(host)
    summary = run(dry_run=True, keep_findings=True)
    assert dump(host) == before
    assert (summary.run_id, summary.drifted, summary.corrected) == (None, 1, 0)
    (finding,) = summary.findings
    assert (finding.drift.observed, finding.drift.expected, finding.action) == (9_980, 9_680, "reported")


def test_a_quick_pass_brings_the_balances_up_to_date(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    user, other = missed(host), missed(host)
    hold_tokens(connection, user, 7)
    host.log(user, 20)
    run()
    assert (balance(host, user), balance(host, other)) == ((320, 7), (300, 0))
    assert host.value("SELECT count(*) FROM trueup.usage_delta") == 0
    assert_true(host)


def test_a_correction_and_its_drift_row_are_written_together_or_not_at_all(
    host: Host, run: Callable[..., RunSummary]
) -> None:
    user = missed(host)
    host.execute("ALTER TABLE trueup.drift ADD CONSTRAINT full_disk CHECK (cause <> 'missed_decrement')")
    summary = run()
    assert (host.counter(user), summary.corrected, summary.defects) == (10_000, 0, 1)
    defect = host.execute("SELECT kind, user_id, detail->>'sqlstate' FROM trueup.defect").one()
    assert tuple(defect) == ("counter_refused", user, "23514")


def test_subscriptions_without_a_user_and_odd_windows_do_not_stop_a_run(
    host: Host, run: Callable[..., RunSummary]
) -> None:
    for column in ("user_id", "start_date"):
        host.execute(f"ALTER TABLE billing_subscription ALTER {column} DROP NOT NULL")
    users = [missed(host) for _ in range(5)]
    for user, start in zip(users, ("infinity", "-infinity", "12000-01-01", "4000-01-01 BC", None), strict=True):
        host.execute(
            "UPDATE billing_subscription SET start_date = CAST(:start AS timestamptz), end_date = "
            "CAST(:start AS timestamptz) WHERE user_id = :user",
            start=start,
            user=user,
        )
    host.execute("INSERT INTO billing_subscription (id, start_date) VALUES (0, now())")
    host.execute("UPDATE ai_usage_log SET created_at = 'infinity' WHERE user_id = :user", user=users[1])
    assert run().checked == 5
    assert [host.counter(user) for user in users] == [10_000, 9_700, 10_000, 9_700, 9_700]
    assert_true(host)
