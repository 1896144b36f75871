"""Hosts, workers and upkeep work on the same few users: no error, no deadlock, and every sum is exact at the end."""

import random
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.partitioned_tables import partition_by_user
from tests.support.sessions import run_at_once
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold, expire_holds
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunInProgressError
from trueup.review.decisions import decide_drift, list_reviews
from trueup.settings.policies import Rules

WRITERS = 8
BATCH = 30


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = create_engine(database, poolclass=NullPool)
    yield engine
    engine.dispose()


def host_writer(engine: Engine, users: list[int], seed: int, rounds: int) -> Callable[[], None]:
    """Write as a host does: batches over many users in random order, updates, deletes and counters, in transactions."""
    dice = random.Random(seed)  # noqa: S311 - it makes a load, and guards nothing
    insert = text(
        "INSERT INTO ai_usage_log (id, user_id, section, total_tokens, success, created_at) "
        "SELECT gen_random_uuid(), u, 'chat', (random() * 100)::int, random() < 0.9, "
        "CAST(:start AS timestamptz) + (random() - 0.3) * interval '2 days' "
        "FROM unnest(CAST(:users AS bigint[])) u RETURNING id"
    )

    def write() -> None:
        with engine.connect() as session:
            session.execute(text("SET lock_timeout = '60s'; SET deadlock_timeout = '10ms'"))
            session.commit()
            for _ in range(rounds):
                some = dice.choices(users, k=BATCH)
                own = list(session.execute(insert, {"users": some, "start": START}).scalars())
                # Only rows of its own: two hosts must not deadlock with each other.
                session.execute(
                    text(
                        "UPDATE ai_usage_log SET total_tokens = total_tokens * 2, success = NOT success, "
                        "user_id = :user, created_at = created_at + interval '1 day' WHERE id = ANY (:ids)"
                    ),
                    {"ids": own[::3], "user": dice.choice(users)},
                )
                session.execute(text("DELETE FROM ai_usage_log WHERE id = ANY (:ids)"), {"ids": own[::4]})
                session.commit() if dice.random() < 0.9 else session.rollback()
                # As Django's select_for_update: the user first, then the counter.
                user = dice.choice(users)
                session.execute(text("SELECT 1 FROM accounts_user WHERE id = :user FOR UPDATE"), {"user": user})
                session.execute(
                    text(
                        "UPDATE billing_subscription SET tokens_remaining = greatest(tokens_remaining - 50, 0) "
                        "WHERE user_id = :user"
                    ),
                    {"user": user},
                )
                session.commit()

    return write


def metered_worker(engine: Engine, users: list[int], seed: int, rounds: int) -> Callable[[], None]:
    """Work as a worker does: open a hold, charge in random order and more than once, close the hold."""
    dice = random.Random(seed)  # noqa: S311 - it makes a load, and guards nothing

    def work() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for number in range(2 * rounds):
                try:
                    hold = hold_tokens(connection, dice.choice(users), 100, task=f"{seed}-{number}")
                except TokensDenied:
                    continue
                for key in dice.choices("ab", k=2):
                    charge_tokens(connection, hold, dice.randint(1, 120), key=key)
                if dice.random() < 0.8:
                    close_hold(connection, hold)

    return work


def upkeep(engine: Engine, users: list[int], rounds: int) -> Callable[[], None]:
    """Reconcile runs, sweeps that expire living holds, and moved windows."""
    dice = random.Random(0)  # noqa: S311 - it makes a load, and guards nothing

    def work() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for number in range(rounds):
                connection.execute(
                    text("UPDATE billing_subscription SET start_date = :start WHERE user_id = :user"),
                    {"start": START + timedelta(hours=dice.randint(-12, 24)), "user": dice.choice(users)},
                )
                expire_holds(connection, now=START + timedelta(days=36_500) if number % 5 == 0 else None)
                reconcile(engine, HostMapping(), batch_size=dice.randint(1, 4))

    return work


def auditor(engine: Engine, rounds: int) -> Callable[[], None]:
    """Check the invariants, which hold at every commit."""

    def work() -> None:
        with Host(engine) as host:
            for _ in range(rounds):
                assert_true(host)

    return work


@pytest.mark.parametrize(
    ("rounds", "partitions"), [(10, None), (5, 3), *(pytest.param(50, n, marks=pytest.mark.long) for n in (None, 8))]
)
def test_hosts_and_workers_and_upkeep_on_the_same_users_leave_true_books(
    host: Host, connection: Connection, engine: Engine, rounds: int, partitions: int | None
) -> None:
    if partitions is not None:
        with engine.begin() as session:
            partition_by_user(session, partitions)
    users = [host.subscriber(500_000_000) for _ in range(5)]
    run_at_once(
        [host_writer(engine, users, seed, rounds) for seed in range(WRITERS)]
        + [metered_worker(engine, users, 100 + seed, rounds) for seed in range(3)]
        + [upkeep(engine, users, rounds), auditor(engine, rounds)]
    )
    assert_true(host)
    for user in users:
        hold_tokens(connection, user, 0)
    assert_true(host)
    reconcile(engine, HostMapping(), rules=Rules(min_age_seconds=0))
    # A positive drift without an explanation waits for a person.
    for item in list_reviews(connection, "bigint"):
        decide_drift(connection, item.id, "accept", by="test", note="as logged")
    assert [read_account(connection, user).drift for user in users] == [0] * len(users)
    assert host.value("SELECT count(*) FROM trueup.drift d WHERE (action = 'corrected') <> (written = expected)") == 0
    assert host.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0


def test_of_several_runs_that_start_at_once_one_works(host: Host, engine: Engine) -> None:
    for _ in range(20):
        host.log(host.subscriber(), 300)

    def run() -> bool:
        try:
            reconcile(engine, HostMapping(), batch_size=1)
        except RunInProgressError:
            return False
        return True

    assert any(run_at_once([run] * 6))
    assert host.value("SELECT count(*) FROM trueup.drift WHERE action = 'corrected'") == 20
    assert host.value("SELECT count(*) FROM trueup.drift") == 20


def test_a_window_that_moves_to_and_fro_under_the_hosts_inserts_loses_and_doubles_nothing(
    host: Host, connection: Connection, engine: Engine
) -> None:
    user = host.subscriber(500_000_000)
    insertion = (
        "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) "
        "SELECT :user, 'chat', 1, :at FROM generate_series(1, :rows)"
    )
    values = {"user": user, "at": START + timedelta(hours=1)}
    host.execute(insertion, **values, rows=20_000)  # so that a rebuild takes its time

    def insert() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as session:
            for _ in range(150):
                session.execute(text(insertion), values | {"rows": 20})

    def move() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as session:
            for number in range(40):
                session.execute(
                    text("UPDATE billing_subscription SET start_date = :start"),
                    {"start": START + timedelta(hours=number % 2)},
                )
                hold_tokens(session, user, 0)

    run_at_once([insert] * 4 + [move] * 2 + [auditor(engine, 25)])
    assert_true(host)
    host.execute("UPDATE billing_subscription SET start_date = :start", start=START)
    hold_tokens(connection, user, 0)
    assert balance(host, user)[0] == read_account(connection, user).consumed == 32_000
