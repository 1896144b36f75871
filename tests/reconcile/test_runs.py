import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.sessions import run_at_once
from tests.support.waiting import wait_for
from trueup.database.engine import create_trueup_engine, get_engine, get_settings
from trueup.errors import InvalidInputError, NotInstalledError, ServiceUnavailableError
from trueup.host.mapping import HostMapping
from trueup.reconcile import shards
from trueup.reconcile.distributed_run import plan_run
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunInProgressError, RunSummary, begin_run, end_run
from trueup.settings.policies import Rules

pytestmark = pytest.mark.dated

RULES = Rules(min_age_seconds=0)


@pytest.fixture
def run(host: Host) -> Callable[..., RunSummary]:
    def run(**more: Any) -> RunSummary:
        return reconcile(get_engine(), HostMapping(), **{"rules": RULES, **more})

    return run


def missed(host: Host, used: int = 300) -> int:
    """A user whose row was logged and never subtracted from the counter."""
    user = host.subscriber(10_000)
    host.log(user, used)
    return user


def runs(host: Host) -> list[tuple[str, str, int]]:
    rows = host.execute("SELECT kind, status, checked FROM trueup.reconcile_run ORDER BY id")
    return [tuple(row) for row in rows]


def let_leases_run_out(host: Host) -> None:
    for table in ("reconcile_run", "reconcile_shard"):
        host.execute(f"UPDATE trueup.{table} SET lease_until = clock_timestamp() WHERE lease_until IS NOT NULL")


def begun(connection: Connection, **more: Any) -> int:
    """Begin a run as another process would, without working on it."""
    made = begin_run(connection, **{"kind": "quick", "rules": RULES, "owner": "x:1", "requested_by": "", **more})
    assert made is not None
    return made.run_id


def test_one_user_may_be_reconciled_alone(host: Host, run: Callable[..., RunSummary]) -> None:
    user, other = missed(host), missed(host)
    assert run(only_user=user).checked == 1
    assert (host.counter(user), host.counter(other)) == (9_700, 10_000)
    assert run(only_user=host.user()).checked == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6])
def test_every_subscription_is_checked_once_with_any_batch_size(
    host: Host, run: Callable[..., RunSummary], batch_size: int
) -> None:
    users = [missed(host, 100 + number) for number in range(5)]
    seen: list[tuple[int, int]] = []
    summary = run(batch_size=batch_size, progress=lambda *figures: seen.append(figures))
    assert (summary.checked, summary.corrected, summary.found_new) == (5, 5, 5)
    assert [host.counter(user) for user in users] == [9_900 - number for number in range(5)]
    assert seen[-1] == (5, 5)
    assert list(host.execute("SELECT user_id FROM trueup.drift ORDER BY id").scalars()) == users


@pytest.mark.parametrize("page", [1, 3, 8])
def test_a_shard_with_more_suspects_than_fit_in_memory_is_read_in_pages(
    host: Host, run: Callable[..., RunSummary], page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.reconcile.shard_worker.PAGE_SIZE", page)
    monkeypatch.setattr(shards.find_suspects, "__kwdefaults__", {"page": page})
    users = [missed(host) if number % 2 else host.subscriber(500) for number in range(8)]
    summary = run(batch_size=2)
    assert (summary.checked, summary.corrected) == (8, 4)
    assert [host.counter(user) for user in users] == [500, 9_700] * 4
    assert run().checked == 8


def test_runs_do_not_overlap(host: Host, connection: Connection, run: Callable[..., RunSummary]) -> None:
    missed(host)
    other = begun(connection)
    for options in ({}, {"dry_run": True}, {"only_user": 1}, {"kind": "deep"}):
        with pytest.raises(RunInProgressError, match="Wait until it ends"):
            run(**options)
    end_run(connection, other)
    end_run(connection, other, status="failed")
    assert run().corrected == 1
    assert run().checked == 1


def test_one_of_ten_concurrent_schedulers_begins_the_run_of_the_period(host: Host) -> None:
    def plan() -> bool:
        engine = create_trueup_engine(get_settings())
        try:
            planned = plan_run(
                engine, kind="quick", rules=RULES, shard_size=1000, requested_by="schedule", every_seconds=3600
            )
        except RunInProgressError:
            return False
        finally:
            engine.dispose()
        return planned is not None

    for _ in range(3):
        assert sum(run_at_once([plan] * 10)) <= 1
    assert host.value("SELECT count(*) FROM trueup.reconcile_run") == 1
    assert host.value("SELECT count(*) FROM trueup.reconcile_shard") == 1


def test_a_period_gets_only_one_run(host: Host, connection: Connection) -> None:
    engine = get_engine()
    plan = {"rules": RULES, "shard_size": 1000, "requested_by": "schedule", "every_seconds": 86_400}
    first = plan_run(engine, kind="quick", **plan)
    assert first is not None
    end_run(connection, first.run_id, status="finished")
    assert plan_run(engine, kind="quick", **plan) is None
    deep = plan_run(engine, kind="deep", offset_seconds=7200, **plan)
    assert deep is not None
    assert host.value(
        "SELECT extract(hour FROM period) = 2 AND period <= started_at AND period > started_at - interval '1 day' "
        "FROM trueup.reconcile_run WHERE kind = 'deep'"
    )


def test_a_run_whose_process_died_is_resumed_at_its_cursor(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    users = [missed(host) for _ in range(4)]

    def die(*_: Any) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        run(batch_size=1, progress=die)
    # The state that a killed process would leave.
    host.execute("UPDATE trueup.reconcile_run SET status = 'running', finished_at = NULL, lease_until = 'infinity'")
    host.execute("UPDATE trueup.reconcile_shard SET status = 'running', lease_until = 'infinity'")
    with pytest.raises(RunInProgressError):
        run()
    host.execute("UPDATE billing_subscription SET tokens_remaining = 1 WHERE user_id = :user", user=users[0])
    let_leases_run_out(host)
    summary = run()
    assert (summary.resumed, summary.checked, summary.corrected) == (True, 4, 4)
    assert runs(host) == [("quick", "finished", 4)]
    assert [host.counter(user) for user in users] == [1, 9_700, 9_700, 9_700]


def test_an_interrupted_run_is_resumed_and_its_figures_cover_all_its_work(
    host: Host, run: Callable[..., RunSummary]
) -> None:
    users = [missed(host) for _ in range(3)]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch_size=1, progress=interrupt)
    assert [row[1] for row in runs(host)] == ["interrupted"]
    summary = run()
    assert (summary.resumed, summary.corrected, summary.tokens_overstated) == (True, 3, 900)
    assert [host.counter(user) for user in users] == [9_700] * 3
    assert not run().resumed


@pytest.mark.parametrize(
    "other", [{"rules": Rules(max_correction=5)}, {"kind": "deep"}, {"only_user": 1}], ids=["rules", "kind", "user"]
)
def test_a_run_of_another_kind_or_rules_does_not_resume_it(
    host: Host, connection: Connection, run: Callable[..., RunSummary], other: dict[str, Any]
) -> None:
    missed(host)
    begun(connection)
    let_leases_run_out(host)
    assert not run(**other).resumed
    assert [row[1] for row in runs(host)] == ["interrupted", "finished"]


def test_a_run_interrupted_long_ago_is_not_resumed(
    host: Host, connection: Connection, run: Callable[..., RunSummary]
) -> None:
    begun(connection)
    let_leases_run_out(host)
    host.execute("UPDATE trueup.reconcile_run SET started_at = started_at - interval '16 minutes'")
    assert not run().resumed
    assert [row[1] for row in runs(host)] == ["interrupted", "finished"]


def test_heartbeats_keep_a_run_from_being_taken_over(
    host: Host, run: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr("trueup.reconcile.runs.LEASE_SECONDS", 0.6)
    for _ in range(3):
        missed(host)
    refused = []

    def slow(*_: Any) -> None:
        threading.Event().wait(0.9)
        with pytest.raises(RunInProgressError):
            reconcile(get_engine(), HostMapping(), rules=RULES)
        refused.append(True)

    assert run(batch_size=1, progress=slow).corrected == 3
    assert len(refused) == 4


def test_a_failed_run_records_its_error_and_the_next_run_can_begin(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        run(progress=fail)
    status, error = host.execute("SELECT status, error FROM trueup.reconcile_run").one()
    assert (status, error) == ("failed", "out of ink")
    assert run().checked == 1
    assert [row[1] for row in runs(host)] == ["failed", "finished"]


def test_a_run_whose_database_goes_away_reports_it_as_unavailable(
    host: Host, run: Callable[..., RunSummary], admin_engine: Any
) -> None:
    for _ in range(2):
        missed(host)
    name = host.value("SELECT current_database()")
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trueup'"

    def go_away(*_: Any) -> None:
        with admin_engine.connect() as admin:
            admin.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        host.execute(cut)

    try:
        with pytest.raises(ServiceUnavailableError):
            run(batch_size=1, progress=go_away)
    finally:
        with admin_engine.connect() as admin:
            admin.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    let_leases_run_out(host)
    summary = run()
    assert (summary.resumed, summary.checked, summary.corrected) == (True, 2, 2)


def test_a_run_on_a_database_without_trueup_says_how_to_set_it_up(empty_database: str) -> None:
    with pytest.raises(NotInstalledError, match="trueup db attach"):
        reconcile(get_engine(), HostMapping())


def test_a_deep_pass_of_one_user_is_refused(host: Host, run: Callable[..., RunSummary]) -> None:
    with pytest.raises(InvalidInputError, match="always checks all users"):
        run(kind="deep", only_user=1)


def test_a_run_keeps_no_transaction_open_between_its_batches(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)
    states: list[str] = []
    run(
        progress=lambda *_: states.extend(
            host.execute(
                "SELECT state FROM pg_stat_activity WHERE application_name = 'trueup' AND datname = current_database()"
            ).scalars()
        )
    )
    assert set(states) == {"idle"}


def test_a_second_pass_finds_nothing_new(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)
    host.subscriber(1_000, counter=5_000)
    first, second = run(), run()
    assert (first.drifted, first.found_new, first.corrected, first.in_review) == (2, 2, 1, 1)
    assert (second.drifted, second.found_new, second.corrected, second.in_review) == (1, 0, 0, 1)
    wait_for(lambda: runs(host)[-1][1] == "finished")


def test_future_usage_and_zero_usage_do_not_stop_a_run(host: Host, run: Callable[..., RunSummary]) -> None:
    user = missed(host)
    later = host.value("SELECT clock_timestamp()") + timedelta(days=400)
    host.log(user, 50, at=later)
    host.log(user, -20)
    host.execute("ALTER TABLE ai_usage_log ALTER total_tokens DROP NOT NULL")
    host.log(user, None)
    host.execute("ALTER TABLE billing_subscription ALTER tokens_remaining TYPE bigint")
    rich = host.subscriber(1_000, counter=2**40)
    for kind in ("quick", "deep"):
        assert run(kind=kind).checked == 2
    rows = host.execute("SELECT user_id, observed, expected FROM trueup.drift ORDER BY user_id, id").all()
    assert [tuple(row) for row in rows] == [(user, 10_000, 9_670), (rich, 2**40, 1_000)]
    assert host.counter(rich) == 2**40, "held for review"
