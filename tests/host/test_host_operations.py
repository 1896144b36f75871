"""What hosts do with their database while tasks run: publish it, drop and detach partitions, delete users."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine

from tests.conftest import cloned_database, settings_for
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.partitioned import DECEMBER, PartitionedHost, known, month, new_host
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import get_engine
from trueup.database.retry import retry_until_recorded
from trueup.errors import TokensDenied, TrueupError
from trueup.gate.holds import close_hold, expire_holds
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.reconcile.local_run import reconcile
from trueup.stack import StackUrls

WITHOUT_IDENTITY = """
    SELECT c.oid::regclass::text FROM pg_class c
    WHERE c.relnamespace = 'trueup'::regnamespace AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
      AND NOT (c.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary))
      AND c.relreplident NOT IN ('f', 'i')
"""


def work(user: int, task: str, *, calls: int = 1) -> int:
    """Do a task's whole life: hold, charge, close. Returns the tokens charged.

    A task whose gate is closed for a moment is requeued; here it tries again.
    """
    hold = retry_until_recorded(lambda connection: hold_tokens(connection, user, 10 * calls, task=task), task)
    for number in range(calls):
        key = str(number)
        retry_until_recorded(lambda connection, key=key: charge_tokens(connection, hold, 10, key=key), task)
    retry_until_recorded(lambda connection: close_hold(connection, hold, completed=True), task)
    return 10 * calls


@contextmanager
def working(workers: int, step: Callable[[int, int], None]) -> Iterator[None]:
    """Repeat a step in threads until the block ends. A step is told its worker's number and its own.

    Raises what a step raised.
    """
    stop = threading.Event()

    def run(worker: int) -> None:
        number = 0
        while not stop.is_set():
            step(worker, number)
            number += 1

    with ThreadPoolExecutor(workers) as threads:
        running = [threads.submit(run, worker) for worker in range(workers)]
        try:
            yield
        finally:
            stop.set()
        for one in running:
            one.result()


def test_a_database_that_publishes_all_its_tables_refuses_no_write_of_trueups(
    host: Host, connection: Connection
) -> None:
    """A published table without a replica identity refuses UPDATE and DELETE."""
    host.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert not host.execute(WITHOUT_IDENTITY).scalars().all()
    user, other = host.subscriber(10_000), host.subscriber(10_000)
    work(user, "published")
    host.log(user, 300)
    host.execute("UPDATE ai_usage_log SET total_tokens = 400 WHERE total_tokens = 300")
    host.execute("DELETE FROM ai_usage_log WHERE total_tokens = 400")
    hold_tokens(connection, other, 100, task="left")
    expire_holds(connection, now=datetime.now(UTC) + timedelta(days=1))
    host.execute("UPDATE billing_subscription SET tokens_remaining = 5 WHERE user_id = :user", user=user)
    host.execute("TRUNCATE ai_usage_log")
    assert reconcile(get_engine(), HostMapping(), kind="deep").corrected >= 0
    attach(HostMapping())
    assert_true(host)


@pytest.fixture
def partitioned(
    stack: StackUrls, admin_engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[PartitionedHost]:
    with (
        cloned_database(stack, admin_engine, "template1") as url,
        settings_for(url, stack, monkeypatch, tmp_path),
        new_host(url, HostMapping()) as host,
    ):
        host.set_up()
        yield host


def test_partitions_detached_and_dropped_under_load_fail_no_task_and_lose_no_charge(
    partitioned: PartitionedHost,
) -> None:
    host = partitioned
    users = [host.subscriber(1_000_000) for _ in range(2)]
    charged = [0, 0]

    def step(worker: int, number: int) -> None:
        charged[worker] += work(users[worker], f"task-{worker}-{number}", calls=2)

    host.execute('ALTER TABLE ai_usage_log DETACH PARTITION "Log 12"; DROP TABLE "Log 12"')
    with working(2, step):
        for turn in range(8):
            host.execute(f"CREATE TABLE turn_{turn} PARTITION OF ai_usage_log {month(12)}")
            host.write(users[0], 7, at=DECEMBER)
            if turn % 2:
                host.execute(f"ALTER TABLE ai_usage_log DETACH PARTITION turn_{turn}")
            host.execute(f"DROP TABLE turn_{turn}")
    assert min(charged) > 0
    reconcile(get_engine(), host.mapping, kind="deep")
    assert [known(user) for user in users] == charged
    assert [host.used(user) for user in users] == charged
    attach(host.mapping)
    assert_true(host, host.mapping)


def test_users_deleted_with_their_rows_while_their_tasks_run_stop_no_other_task_and_no_delete(host: Host) -> None:
    host.execute(
        "ALTER TABLE ai_usage_log DROP CONSTRAINT ai_usage_log_user_id_fkey, "
        "ADD FOREIGN KEY (user_id) REFERENCES accounts_user (id) ON DELETE CASCADE; "
        "ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_fkey, "
        "ADD FOREIGN KEY (user_id) REFERENCES accounts_user (id) ON DELETE CASCADE"
    )
    stays = host.subscriber(1_000_000)
    leaves = [host.subscriber(1_000_000) for _ in range(12)]
    current, charged, ends = [leaves[0]], [0], set()

    def step(worker: int, number: int) -> None:
        if worker == 0:
            charged[0] += work(stays, f"stays-{number}")
            return
        try:
            work(current[0], f"leaves-{worker}-{number}", calls=3)
        except TrueupError as error:
            ends.add(type(error))

    with working(3, step):
        for user in leaves:
            current[0] = user
            done = host.used(user)
            wait_for(lambda user=user, done=done: host.used(user) > done, "a task of this user is at work")
            host.execute("DELETE FROM accounts_user WHERE id = :user", user=user)
        wait_for(lambda: TokensDenied in ends, "a task of a deleted user is denied")
    assert TokensDenied in ends
    assert host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = ANY(:users)", users=leaves) == 0
    assert host.used(stays) == charged[0] > 0
    with get_engine().connect() as connection:
        expire_holds(connection, now=datetime.now(UTC) + timedelta(days=1))
        connection.commit()
    deep = reconcile(get_engine(), HostMapping(), kind="deep")
    assert deep.run_id is not None
    assert_true(host)
