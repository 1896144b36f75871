"""Runs with slow scans, with owners that return late, and with host rows that refuse a correction."""

import time
from typing import Any

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

from tests.reconcile.test_shards import RULES, counters, let_leases_run_out, missed, plan, work
from tests.support.host import Host
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.reconcile import shard_worker
from trueup.reconcile.batch import BatchContext, reconcile_batch
from trueup.reconcile.distributed_run import plan_run
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.shards import ShardLostError, Step, claim_shard
from trueup.settings.policies import Rules

DAY_SECONDS, QUARTER_SECONDS = 86_400, 900


def planned(kind: Any, *, every: int | None = None, rules: Rules = RULES) -> int | None:
    run = plan_run(get_engine(), kind=kind, rules=rules, requested_by="", shard_size=1_000, every_seconds=every)
    return run.run_id if run else None


@pytest.mark.parametrize(
    ("kind", "slow"), [("quick", "find_suspects"), ("deep", "find_suspects"), ("deep", "find_balance_mismatches")]
)
def test_a_scan_that_takes_all_of_a_tasks_time_does_not_prevent_the_end_of_a_run(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str, slow: str
) -> None:
    missed(host, 3)
    run_id = plan(host, kind=kind)
    real = getattr(shard_worker, slow)

    def slowly(*values: Any, **more: Any) -> Any:
        time.sleep(0.3)
        return real(*values, **more)

    monkeypatch.setattr(shard_worker, slow, slowly)
    outcomes = [work(run_id, 1, seconds=0.2, batch_size=1) for _ in range(8)]
    assert any(outcome.ended for outcome in outcomes)
    assert counters(host) == [9_700] * 3


def test_an_owner_that_returns_to_an_ended_run_writes_nothing(host: Host, connection: Connection) -> None:
    users = missed(host, 2)
    run_id = plan(host)
    shard = claim_shard(connection, run_id, "paused")
    assert shard is not None
    let_leases_run_out(host)
    planned("deep")
    assert host.value("SELECT status FROM trueup.reconcile_run WHERE id = :run", run=run_id) == "interrupted"
    context = BatchContext.read(connection, HostMapping(), dry_run=False, rules=RULES)
    step = Step(number=1, attempt=shard.attempt, cursor=users[-1], checked=2)
    with pytest.raises(ShardLostError):
        reconcile_batch(connection, context, run_id, users, step)
    assert counters(host) == [10_000, 10_000]


@pytest.mark.parametrize("rules", [RULES, Rules(min_age_seconds=0, tolerance=1)])
def test_an_interrupted_deep_pass_is_repeated_on_the_same_day(host: Host, rules: Rules) -> None:
    missed(host, 3)
    first = planned("deep", every=DAY_SECONDS)
    let_leases_run_out(host)
    quick = planned("quick", every=QUARTER_SECONDS, rules=rules)
    assert quick is not None
    ended = shard_ended(quick, rules)
    assert ended == "finished"
    again = planned("deep", every=DAY_SECONDS, rules=rules)
    assert again is not None
    assert again != first


def shard_ended(run_id: int, rules: Rules) -> str | None:
    ended = work(run_id, 1, rules=rules).ended
    return ended.status if ended else None


def test_a_message_of_a_run_planned_under_other_rules_does_nothing(host: Host) -> None:
    missed(host, 2)
    run_id = plan(host)
    assert work(run_id, 1, rules=Rules(min_age_seconds=0, max_correction=10)).ended is None
    assert counters(host) == [10_000, 10_000]


def refuse(host: Host, condition: str) -> None:
    host.execute(
        f"ALTER TABLE billing_subscription ADD CONSTRAINT picky CHECK ({condition} OR tokens_remaining >= 10000)"
    )


def test_a_refused_correction_does_not_stop_the_corrections_of_other_users(host: Host) -> None:
    users = missed(host, 5)
    refuse(host, f"user_id <> {users[1]}")
    for _ in range(2):
        summary = reconcile(get_engine(), HostMapping(), rules=RULES)
        assert summary.status == "finished"
        assert counters(host) == [9_700, 10_000, 9_700, 9_700, 9_700]
        defect = host.execute("SELECT kind, user_id FROM trueup.defect WHERE run_id = :run", run=summary.run_id).one()
        assert tuple(defect) == ("counter_refused", users[1])
        # The next run reports the same cause: a run that could not correct a counter has not seen it correct.
        [told] = host.execute("SELECT cause, action FROM trueup.drift WHERE user_id = :user", user=users[1]).all()
        assert tuple(told) == ("missed_decrement", "reported")


def test_when_all_rows_refuse_the_run_fails_and_its_error_shows_no_row(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed(host, 4)
    refuse(host, "false")
    monkeypatch.setattr(shard_worker, "MAX_REFUSED", 2)
    with pytest.raises(DBAPIError):
        reconcile(get_engine(), HostMapping(), rules=RULES)
    error = host.value("SELECT error FROM trueup.reconcile_run")
    assert "picky" in error
    assert not any(leak in error for leak in ("SQL:", "Failing row", "parameters"))


def test_a_batch_commits_without_waiting_for_the_disk_and_the_end_of_a_shard_waits(host: Host) -> None:
    """A counter's row stays locked until its commit ends, so a batch's commit must be fast."""
    missed(host, 3)
    host.execute("CREATE TABLE public.commits (at text, waits text)")
    host.execute(
        "CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO public.commits VALUES (TG_ARGV[0], current_setting('synchronous_commit')); RETURN NEW; END $$"
    )
    for table, event_of, name in (
        ("trueup.drift", "INSERT", "correction"),
        ("trueup.balance", "INSERT OR UPDATE", "balance"),
        ("trueup.reconcile_run", "UPDATE OF finished_at", "end"),
    ):
        host.execute(
            f"CREATE TRIGGER note AFTER {event_of} ON {table} FOR EACH ROW EXECUTE FUNCTION public.note('{name}')"
        )
    reconcile(get_engine(), HostMapping(), rules=RULES)
    rows = host.execute("SELECT DISTINCT at, waits FROM public.commits ORDER BY at").all()
    assert [tuple(row) for row in rows] == [("balance", "off"), ("correction", "off"), ("end", "on")]


def test_a_drift_whose_row_was_deleted_meanwhile_is_recorded_again(host: Host) -> None:
    host.plan(500)
    users = [host.subscriber(10_000, counter=10_500) for _ in range(2)]
    reconcile(get_engine(), HostMapping(), rules=RULES)
    deleted = []

    def delete(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "correct_counters" in statement and not deleted:
            deleted.append(host.value("DELETE FROM trueup.drift WHERE user_id = :user RETURNING id", user=users[0]))

    event.listen(get_engine(), "before_cursor_execute", delete)
    summary = reconcile(get_engine(), HostMapping(), rules=RULES)
    assert (summary.drifted, summary.in_review, summary.found_new) == (2, 2, 1)
    assert deleted
    rows = host.execute("SELECT user_id, run_id, last_run_id FROM trueup.drift ORDER BY user_id").all()
    assert [tuple(row) for row in rows] == [(users[0], 2, 2), (users[1], 1, 2)]
