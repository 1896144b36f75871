"""Users and scans that take longer than the statement timeout: later users are checked, and no user is forgotten."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event

from tests.cli.conftest import trueup
from tests.reconcile.test_shards import RULES, counters, let_leases_run_out, missed, plan, work
from tests.support.host import Host
from trueup.database.engine import dispose_engine, get_engine
from trueup.errors import ServiceUnavailableError
from trueup.host.mapping import HostMapping
from trueup.reconcile import shard_worker
from trueup.reconcile.distributed_run import plan_run
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.settings.settings import get_settings

SLOW = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '57014', MESSAGE = 'statement timeout'; END $$"
Slow = Callable[..., list[int]]


@pytest.fixture
def slow(host: Host) -> Iterator[Slow]:
    """Give a function that makes statements about these users reach their time limit.

    It returns a list; each batch that ends so appends its size.
    """
    hooks: list[Any] = []

    def make_slow(users: list[int], statement_of: str = "trueup.drift_past") -> list[int]:
        ended: list[int] = []

        def hook(conn: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
            values = parameters if isinstance(parameters, dict) else {}
            about = values.get("user_ids", [values.get("user_id")])
            if statement_of in statement and set(about) & set(users):
                ended.append(len(about))
                return SLOW, {}
            return statement, parameters

        event.listen(get_engine(), "before_cursor_execute", hook, retval=True)
        hooks.append(hook)
        return ended

    yield make_slow
    for hook in hooks:
        event.remove(get_engine(), "before_cursor_execute", hook)


def run(**more: Any) -> RunSummary:
    return reconcile(get_engine(), HostMapping(), **{"rules": RULES, **more})


def defects(host: Host, run_id: int | None) -> list[tuple[Any, ...]]:
    rows = host.execute("SELECT kind, user_id, repaired FROM trueup.defect WHERE run_id = :run ORDER BY id", run=run_id)
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_a_user_who_takes_too_long_is_skipped_and_recorded_and_later_users_are_checked(
    host: Host, slow: Slow, batch_size: int
) -> None:
    users = missed(host, 25)
    ended = slow([users[7]])
    summary = run(batch_size=batch_size)
    assert (summary.status, summary.checked, summary.corrected, summary.defects) == ("finished", 25, 24, 1)
    assert [users[place] for place, left in enumerate(counters(host)) if left != 9_700] == [users[7]]
    assert defects(host, summary.run_id) == [("counter_too_slow", users[7], False)]
    # The whole batch, then a tenth, then the user alone, and one retry.
    assert ended == ([1, 1] if batch_size == 1 else [25, 2, 1, 1])


def test_a_skipped_user_does_not_count_as_correct(host: Host, slow: Slow) -> None:
    users = missed(host, 3)
    slow_users = [users[1]]
    slow(slow_users)
    run()
    slow_users.clear()
    summary = run(keep_findings=True)
    assert [(found.drift.user_id, found.explanation.cause) for found in summary.findings] == [
        (users[1], "missed_decrement")
    ]
    assert (counters(host), summary.defects) == ([9_700] * 3, 0)


def test_batches_grow_again_behind_a_slow_user(host: Host, slow: Slow) -> None:
    users = missed(host, 40)
    slow([users[0]])
    seen: list[int] = []
    assert run(batch_size=10, progress=lambda checked, _total: seen.append(checked)).corrected == 39
    assert seen == [10, 12, 16, 24, 34, 40, 40]


def test_a_dry_run_reports_a_slow_user_and_writes_nothing(host: Host, slow: Slow) -> None:
    users = missed(host, 3)
    slow([users[1]])
    summary = run(dry_run=True)
    assert (summary.checked, summary.drifted, summary.defects) == (3, 2, 1)
    assert [(defect.kind, defect.user_id) for defect in summary.defect_rows] == [("counter_too_slow", users[1])]
    assert host.value("SELECT count(*) FROM trueup.defect") == 0


def test_a_run_reports_a_slow_user(host: Host) -> None:
    users = missed(host, 2)
    host.execute(
        "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF NEW.user_id = {users[0]} THEN RAISE EXCEPTION USING ERRCODE = '57014'; END IF; RETURN NEW; END $$"
    )
    host.execute("CREATE TRIGGER slow BEFORE INSERT ON trueup.drift FOR EACH ROW EXECUTE FUNCTION public.slow()")
    shown = trueup("reconcile", "--fail-on-drift", code=3).stdout
    for word in ("counter too slow", f" {users[0]} ", "defects             1"):
        assert word in shown


def test_when_many_take_too_long_the_run_ends_instead_of_waiting_for_each(
    host: Host, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_worker, "MAX_SLOW", 2)
    users = missed(host, 6)
    ended = slow(users)
    with pytest.raises(ServiceUnavailableError, match="statement timeout"):
        run()
    assert len(defects(host, 1)) == 2
    # After that, the run waits for no other user.
    assert len(ended) == 1 + 2 + 2 + 2


def test_a_balance_whose_repair_takes_too_long_does_not_stop_other_repairs(host: Host, slow: Slow) -> None:
    users = missed(host, 4)
    run()
    host.execute("UPDATE trueup.balance SET consumed = consumed + 5")
    slow([users[1]], "trueup.repair_balance")
    summary = run(kind="deep")
    assert summary.status == "finished"
    mismatches = [("balance_untrue", user, user != users[1]) for user in users]
    assert sorted(defects(host, summary.run_id)) == sorted(mismatches)
    assert host.value("SELECT count(*) FROM trueup.balance WHERE consumed <> 300") == 1


def test_planning_reads_the_subscriptions_once_under_the_limit_of_long_reads(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed(host, 3)
    host.execute("CREATE SEQUENCE public.looks")
    host.execute(
        "CREATE OR REPLACE FUNCTION trueup.shard_ends(p_size bigint) RETURNS SETOF bigint LANGUAGE sql AS $$ "
        "SELECT nextval('public.looks') FROM pg_sleep(1.1) $$"
    )
    monkeypatch.setenv("TRUEUP_STATEMENT_TIMEOUT_SECONDS", "1")
    monkeypatch.setattr("trueup.reconcile.runs.LEASE_SECONDS", 1.0)
    get_settings.cache_clear()
    dispose_engine()
    plan(host)
    assert host.value("SELECT last_value FROM public.looks") == 1
    assert host.value("SELECT count(*) FROM trueup.reconcile_shard") == 2
    # The lease begins after the scan.
    assert host.value("SELECT lease_until - started_at > interval '2 seconds' FROM trueup.reconcile_run")
    let_leases_run_out(host)
    monkeypatch.setattr("trueup.reconcile.local_run.SMALLEST_SHARD", 1)
    assert run(dry_run=True, jobs=2).checked == 3
    get_settings.cache_clear()


def test_a_plan_gives_up_at_its_own_limit(host: Host) -> None:
    host.execute(
        "CREATE OR REPLACE FUNCTION trueup.shard_ends(p_size bigint) RETURNS SETOF bigint LANGUAGE sql AS $$ "
        "SELECT 1::bigint FROM pg_sleep(60) $$"
    )
    with pytest.raises(ServiceUnavailableError, match="statement timeout"):
        plan_run(get_engine(), kind="quick", rules=RULES, requested_by="", shard_size=1, scan_timeout_seconds=1)
    assert host.value("SELECT count(*) FROM trueup.reconcile_run") == 0


def test_a_slow_user_in_a_workers_shard_is_skipped(host: Host, slow: Slow) -> None:
    users = missed(host, 3)
    slow([users[0]])
    ended = work(plan(host), 1, batch_size=100).ended
    assert (ended.status, ended.corrected, ended.defects) == ("finished", 2, 1)
