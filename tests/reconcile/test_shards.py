"""Shards: their owners, their progress, and errors in the middle of a shard."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from tests.support.books import dump
from tests.support.host import Host, pooled_engine
from tests.support.waiting import wait_for
from tests.support.work import hold_tokens
from trueup.database.engine import get_engine
from trueup.errors import ServiceUnavailableError
from trueup.host.mapping import HostMapping, UserIdType
from trueup.install.install import install
from trueup.reconcile import shards
from trueup.reconcile.batch import BatchContext, reconcile_batch
from trueup.reconcile.distributed_run import plan_run, sweep, work_on_shard
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary, end_run
from trueup.reconcile.shards import (
    MAX_FAILURES,
    Shard,
    ShardLostError,
    Step,
    claim_shard,
    end_shard,
    move_shard,
    shard_ends,
)
from trueup.settings.policies import Rules

TRUEUP = Path(sys.executable).with_name("trueup")
RULES = Rules(min_age_seconds=0)


@pytest.fixture
def run(host: Host) -> Callable[..., RunSummary]:
    def run(**more: Any) -> RunSummary:
        return reconcile(get_engine(), HostMapping(), **{"rules": RULES, **more})

    return run


def missed(host: Host, count: int = 1) -> list[int]:
    """Users with one logged row each that was never subtracted from the counter."""
    users = [host.subscriber(10_000) for _ in range(count)]
    for user in users:
        host.log(user, 300)
    return users


def counters(host: Host) -> list[int | None]:
    return list(host.execute("SELECT tokens_remaining FROM billing_subscription ORDER BY user_id").scalars())


def plan(host: Host, shard_size: int = 1000, **more: Any) -> int:
    planned = plan_run(
        get_engine(), **{"kind": "quick", "rules": RULES, "requested_by": "", "shard_size": shard_size, **more}
    )
    assert planned is not None
    return planned.run_id


def let_leases_run_out(host: Host) -> None:
    for table in ("reconcile_run", "reconcile_shard"):
        host.execute(f"UPDATE trueup.{table} SET lease_until = clock_timestamp() WHERE lease_until IS NOT NULL")


def work(run_id: int, number: int, **more: Any) -> Any:
    values = {"rules": RULES, "batch_size": 1, "seconds": 60, **more}
    return work_on_shard(get_engine(), HostMapping(), run_id=run_id, number=number, **values)


@pytest.mark.parametrize("user_id_type", ["bigint", "uuid", "text"])
def test_shards_of_any_kind_of_user_id_hold_each_user_once(empty_database: str, user_id_type: UserIdType) -> None:
    mapping = HostMapping(user_id_type=user_id_type)
    engine = pooled_engine(empty_database)
    ids = {"bigint": "i - 50", "uuid": "gen_random_uuid()", "text": "chr(97 + i % 26) || i || 'Ä'"}[user_id_type]
    with engine.begin() as connection:
        install(connection, mapping, with_host_tables=True)
        connection.execute(text("INSERT INTO billing_tokenplan (id, name, tokens_included) VALUES (1, 'p', 1000)"))
        connection.execute(text(f"INSERT INTO accounts_user SELECT {ids}, i, '' FROM generate_series(1, 100) i"))
        connection.execute(
            text(
                "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
                "SELECT row_number() OVER (), id, 1, '2024-11-01', 10 FROM accounts_user"
            )
        )
        users = list(connection.scalars(text("SELECT id FROM accounts_user ORDER BY id")))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert shard_ends(connection, 30) == [users[29], users[59], users[89]]
        assert shard_ends(connection, 100) == shard_ends(connection, 1000) == []
        assert shard_ends(connection, 50) == [users[49]]
    engine.dispose()
    for dry_run in (True, False):
        found = reconcile(get_engine(), mapping, jobs=3, rules=RULES, dry_run=dry_run, keep_findings=True)
        assert (found.checked, found.drifted) == (100, 100)
        assert sorted(map(str, users)) == sorted(str(finding.drift.user_id) for finding in found.findings)


def test_a_user_added_during_the_run_belongs_to_the_last_shard(host: Host, connection: Connection) -> None:
    users = missed(host, 4)
    run_id = plan(host, 2)
    rows = host.execute("SELECT first_user, last_user FROM trueup.reconcile_shard ORDER BY number").all()
    assert [tuple(row) for row in rows] == [(None, users[1]), (users[1], None)]
    (later,) = missed(host)
    assert [work(run_id, number).ended is not None for number in (1, 2)] == [False, True]
    assert counters(host) == [9_700] * 5
    assert host.counter(later) == 9_700


@pytest.mark.parametrize("jobs", [2, 4])
def test_several_jobs_share_a_run(
    host: Host, run: Callable[..., RunSummary], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.reconcile.local_run.SMALLEST_SHARD", 2)
    missed(host, 12)
    before = dump(host)
    assert run(jobs=jobs, dry_run=True).drifted == 12
    assert dump(host) == before
    summary = run(jobs=jobs, batch_size=1)
    assert (summary.checked, summary.corrected) == (12, 12)
    assert counters(host) == [9_700] * 12
    assert host.value("SELECT count(*) FROM trueup.reconcile_shard WHERE status = 'finished'") > 3


def test_one_owner_works_on_a_shard_and_the_previous_owner_is_fenced(host: Host, connection: Connection) -> None:
    users = missed(host, 2)
    run_id = plan(host)
    slow = claim_shard(connection, run_id, "slow")
    assert slow is not None
    assert claim_shard(connection, run_id, "other") is None
    let_leases_run_out(host)
    other = claim_shard(connection, run_id, "other")
    assert other is not None
    context = BatchContext.read(connection, HostMapping(), dry_run=False, rules=RULES)
    before = dump(host)
    step = Step(number=1, attempt=slow.attempt, cursor=users[0], checked=1)
    with pytest.raises(ShardLostError):
        reconcile_batch(connection, context, run_id, users[:1], step)
    with pytest.raises(ShardLostError):
        move_shard(connection, run_id, step, "bigint")
    assert not end_shard(connection, slow, finished=True)
    after = dump(host)
    assert {name for name in before if before[name] != after[name]} <= {"trueup.balance", "trueup.usage_delta"}
    step = Step(number=1, attempt=other.attempt, cursor=users[0], checked=1)
    assert reconcile_batch(connection, context, run_id, users[:1], step)[0].action == "corrected"
    assert end_shard(connection, other, finished=True)


def fail_inserts(host: Host, times: int, how: str) -> None:
    """Let a number of inserts of drift rows fail, as a deadlock or a failing server would."""
    host.execute("CREATE SEQUENCE public.failures")
    host.execute(
        "CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('public.failures') <= {times} THEN {how}; END IF; RETURN NULL; END $$"
    )
    host.execute(
        "CREATE TRIGGER fail AFTER INSERT ON trueup.drift REFERENCING NEW TABLE AS new_rows "
        "FOR EACH STATEMENT EXECUTE FUNCTION public.fail()"
    )


ERRORS = {
    "deadlock": "RAISE EXCEPTION USING ERRCODE = '40P01'",
    "serialization failure": "RAISE EXCEPTION USING ERRCODE = '40001'",
    "statement timeout": "RAISE EXCEPTION USING ERRCODE = '57014'",
    "lost connection": "PERFORM pg_terminate_backend(pg_backend_pid())",
}


@pytest.mark.parametrize("how", ERRORS)
def test_a_transient_error_is_retried_and_nothing_is_done_twice(
    host: Host, run: Callable[..., RunSummary], how: str
) -> None:
    missed(host, 6)
    fail_inserts(host, 2, ERRORS[how])
    summary = run(batch_size=2)
    assert (summary.status, summary.checked, summary.corrected) == ("finished", 6, 6)
    assert counters(host) == [9_700] * 6
    assert host.value("SELECT count(*) FROM trueup.drift") == 6


def test_a_permanent_error_ends_the_run_without_a_partial_batch(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host, 2)
    fail_inserts(host, 1000, ERRORS["deadlock"])
    with pytest.raises(ServiceUnavailableError):
        run()
    assert counters(host) == [10_000] * 2
    assert host.value("SELECT last_value FROM public.failures") == MAX_FAILURES
    assert host.execute("SELECT status, error IS NULL FROM trueup.reconcile_run").one() == ("failed", False)


def test_batches_that_take_too_long_become_smaller(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host, 9)
    how = "IF (SELECT count(*) FROM new_rows) > 2 THEN RAISE EXCEPTION USING ERRCODE = '57014'; END IF"
    fail_inserts(host, 1000, how)
    assert run(batch_size=9).corrected == 9


def test_users_and_subscriptions_deleted_during_the_run_are_skipped(host: Host, run: Callable[..., RunSummary]) -> None:
    users = missed(host, 4)

    def delete(checked: int, _total: int) -> None:
        if checked == 1:
            host.execute("DELETE FROM ai_usage_log WHERE user_id = ANY (:users)", users=users[1:3])
            host.execute("DELETE FROM billing_subscription WHERE user_id = ANY (:users)", users=users[1:3])
            host.execute("DELETE FROM accounts_user WHERE id = :user", user=users[1])

    summary = run(batch_size=1, progress=delete)
    assert (summary.status, summary.corrected) == ("finished", 2)
    assert counters(host) == [9_700] * 2


def test_a_renewal_between_compare_and_correct_keeps_what_it_set(host: Host, run: Callable[..., RunSummary]) -> None:
    """Also if it sets the same value that the run had seen."""
    (user,) = missed(host)
    renewed = []

    def renew(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "correct_counters" in statement and not renewed:
            renewed.append(True)
            host.execute("UPDATE billing_subscription SET start_date = clock_timestamp(), tokens_remaining = 10000")

    event.listen(get_engine(), "before_cursor_execute", renew)
    run()
    assert renewed
    assert host.counter(user) == 10_000
    assert host.value("SELECT action FROM trueup.drift") == "lost_race"
    assert run().drifted == 0


def test_the_shard_of_a_killed_worker_is_resumed_at_its_cursor(host: Host) -> None:
    missed(host, 40)
    host.execute(
        "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END $$"
    )
    host.execute("CREATE TRIGGER slow BEFORE INSERT ON trueup.drift FOR EACH ROW EXECUTE FUNCTION public.slow()")
    environment = os.environ | {"TRUEUP_RECONCILE__MIN_AGE_SECONDS": "0"}
    command = [TRUEUP, "reconcile", "--batch-size", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: host.value("SELECT count(*) FROM trueup.drift") >= 5)
        process.send_signal(signal.SIGKILL)
    wait_for(
        lambda: not host.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trueup'"), "its end"
    )
    done = host.value("SELECT checked FROM trueup.reconcile_shard")
    assert 5 <= done < 40
    assert host.value("SELECT count(*) FROM trueup.drift") == done
    assert host.value("SELECT count(*) FROM billing_subscription WHERE tokens_remaining = 9700") == done
    let_leases_run_out(host)
    summary = reconcile(get_engine(), HostMapping(), rules=RULES)
    assert (summary.resumed, summary.checked, summary.corrected) == (True, 40, 40)
    assert counters(host) == [9_700] * 40
    assert host.value("SELECT count(DISTINCT user_id) = 40 AND count(*) = 40 FROM trueup.drift")


def test_the_sweeper_sends_abandoned_shards_again_and_ends_finished_runs(host: Host, connection: Connection) -> None:
    missed(host, 4)
    engine = get_engine()
    run_id = plan(host, 2, every_seconds=3600)
    assert sweep(engine, RULES) == [(run_id, 1), (run_id, 2)]
    claimed = claim_shard(connection, run_id, "dies", number=1)
    assert claimed is not None
    assert sweep(engine, RULES) == [(run_id, 2)]
    assert work(run_id, 1).taken is False
    assert work(run_id, 2).taken
    let_leases_run_out(host)
    assert sweep(engine, RULES) == [(run_id, 1)]
    again = claim_shard(connection, run_id, "finishes", number=1)
    assert again is not None
    assert end_shard(connection, again, finished=True)
    assert sweep(engine, RULES) == []
    assert host.value("SELECT status FROM trueup.reconcile_run") == "finished"


def test_a_shard_that_fails_again_and_again_is_given_up(host: Host, connection: Connection) -> None:
    missed(host)
    run_id = plan(host, every_seconds=3600)
    for _ in range(MAX_FAILURES):
        assert sweep(get_engine(), RULES) == [(run_id, 1)]
        assert claim_shard(connection, run_id, "dies") is not None
        let_leases_run_out(host)
    assert sweep(get_engine(), RULES) == []
    status, error = host.execute("SELECT status, error FROM trueup.reconcile_run").one()
    assert (status, error) == ("failed", "its worker died on every attempt")


def test_a_persons_run_is_not_resumed_under_other_rules(host: Host, connection: Connection) -> None:
    missed(host)
    plan(host, rules=Rules(max_correction=1))
    let_leases_run_out(host)
    assert sweep(get_engine(), RULES) == []


def test_a_shard_that_uses_up_its_time_is_released_for_the_next_message(host: Host) -> None:
    missed(host, 3)
    run_id = plan(host)
    first = work(run_id, 1, seconds=0)
    assert (first.taken, first.left, first.ended) == (True, True, None)
    second = work(run_id, 1)
    assert second.ended is not None
    assert second.ended.corrected == 3


def test_failures_are_counted_from_the_last_progress(host: Host, connection: Connection) -> None:
    (user,) = missed(host)
    run_id = plan(host)
    for _ in range(2 * MAX_FAILURES):
        shard = claim_shard(connection, run_id, "me")
        assert shard is not None
        move_shard(connection, run_id, Step(number=1, attempt=shard.attempt, cursor=user, checked=1), "bigint")
        end_shard(connection, shard, finished=False, error="out of ink")
    assert not end_run(connection, run_id)


def test_all_users_except_those_with_a_clearly_correct_counter_are_suspects(host: Host, connection: Connection) -> None:
    def right() -> int:
        user = host.subscriber(1_000, counter=900)
        host.log(user, 100)
        hold_tokens(connection, user, 0)
        return user

    plain, used, granted, unknown, renewed, off, null = (right() for _ in range(7))
    host.log(used, 5)
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_at) VALUES (:user, 1, 'x', now())",
        user=granted,
    )
    host.execute("DELETE FROM trueup.balance WHERE user_id = :user", user=unknown)
    host.execute("UPDATE billing_subscription SET start_date = now() WHERE user_id = :user", user=renewed)
    host.execute("UPDATE billing_subscription SET tokens_remaining = 899 WHERE user_id = :user", user=off)
    host.execute("UPDATE billing_subscription SET tokens_remaining = NULL WHERE user_id = :user", user=null)

    def suspects(after: int | None = None, last: int | None = None, page: int = 100) -> list[Any]:
        return shards.find_suspects(connection, HostMapping(), after, last, page=page)

    assert suspects() == [used, granted, unknown, renewed, off, null]
    assert suspects(after=granted, last=off) == [unknown, renewed, off]
    assert suspects(page=2) == [used, granted]
    host.execute("TRUNCATE ai_usage_log")
    assert suspects()[0] == plain


def test_owner_names_are_unique() -> None:
    assert shards.new_owner() != shards.new_owner()
    assert Shard(after=1).position == 1
    assert Shard(after=1, cursor=5).position == 5
