"""A session may plan its statements while trueup's tables are empty, and keep the plans while they grow."""

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from tests.support.host import Host
from tests.support.work import OWNER, charge_tokens, hold_tokens
from trueup.gate.holds import Hold, abandon_calls, close_hold, expire_holds, keep_holds
from trueup.gate.provider_calls import begin_call, end_call, extend_hold
from trueup.usage.charges import find_answer

ROWS = 3_000

# As many rows of other users as a busy service writes before PostgreSQL first counts a table's rows.
GROWTH = [
    """INSERT INTO trueup.balance (user_id, window_start, log_epoch)
       SELECT -i, '2024-01-01Z', 0 FROM generate_series(1, :rows) i""",
    """INSERT INTO trueup.hold (user_id, task_id, attempt, feature_name, section, owner, status, tokens_reserved,
                               opened_at, expires_at, closed_at)
       SELECT -i, 't' || i, 1, 'F', 'chat', 'o', 'settled', 0, now(), now(), now() FROM generate_series(1, :rows) i""",
    """INSERT INTO trueup.charge (user_id, task_id, call_key, attempt, log_id, section, model_name, tokens_total,
                                 tokens_covered, late, charged_at)
       SELECT -i, 't' || i, '1', 1, 'x', 'chat', 'm', 1, 1, false, now() FROM generate_series(1, :rows) i""",
    """INSERT INTO trueup.call_intent (user_id, task_id, call_key, attempt, tokens_bound, outcome, started_at)
       SELECT -i, 't' || i, '1', 1, 1, 'unknown', now() FROM generate_series(1, :rows) i""",
    """INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
       SELECT -i, now(), 1 FROM generate_series(1, :rows) i""",
]

_READ = """
    SELECT relname, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables
    WHERE schemaname = 'trueup' AND relname IN ('balance', 'hold', 'charge', 'call_intent', 'usage_delta')
      AND seq_tup_read + coalesce(idx_tup_fetch, 0) >= 1000
"""


@pytest.fixture
def session(database: str) -> Iterator[Connection]:
    """A session of its own, in which the caller commits."""
    engine = create_engine(database, poolclass=NullPool)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def begin(connection: Connection, hold: Hold) -> None:
    begin_call(connection, hold, call_key="1", max_tokens=10, lease_seconds=60, ttl_seconds=600)


def keep(connection: Connection, hold: Hold) -> None:
    keep_holds(connection, [hold], lease_seconds=60, ttl_seconds=600, max_seconds=timedelta(days=1).total_seconds())


WAYS: dict[str, Callable[[Connection, Hold], object]] = {
    "open_hold": lambda connection, hold: hold_tokens(connection, hold.user_id, 10),
    "open_hold again": lambda connection, hold: hold_tokens(connection, hold.user_id, 10, task=hold.task_id),
    "begin_call": begin,
    "end_call": lambda connection, hold: end_call(connection, hold, call_key="1", unknown=True),
    "extend_hold": lambda connection, hold: extend_hold(connection, hold, 10),
    "keep_holds": keep,
    "abandon_calls": lambda connection, hold: abandon_calls(connection, hold.user_id, hold.task_id, owner=OWNER),
    "find_answer": lambda connection, hold: find_answer(connection, hold, "1"),
    "record_charge": lambda connection, hold: charge_tokens(connection, hold, 10, key=str(uuid.uuid4())),
    "record_charge again": lambda connection, hold: charge_tokens(connection, hold, 10),
    "record_usage": lambda connection, hold: connection.execute(
        text(
            "SELECT trueup.record_usage(:user, '', :key, gen_random_uuid()::text, 'chat', 1, 1, 2, 1, true, 'm', NULL, "
            "'{}', NULL, '1 h', NULL)"
        ),
        {"user": hold.user_id, "key": str(uuid.uuid4())},
    ),
    "close_hold": lambda connection, hold: close_hold(connection, hold),
    "expire_holds": lambda connection, hold: expire_holds(connection),
    "settle_owed_charge": lambda connection, hold: connection.execute(
        text("SELECT trueup.settle_owed_charge(:user, 't', '1', NULL)"), {"user": hold.user_id}
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_tasks_and_workers_call_finds_its_rows_by_index_though_it_was_planned_on_empty_tables(
    host: Host, session: Connection, way: str
) -> None:
    user, other = host.subscriber(), host.subscriber()
    host.execute("VACUUM ANALYZE")  # PostgreSQL has seen that the tables are empty
    for _ in range(8):  # a statement's plan is kept after five
        hold = hold_tokens(session, user, 10)
        WAYS[way](session, hold)
        session.commit()
    for statement in GROWTH:
        host.execute(statement, rows=ROWS)
    hold = hold_tokens(session, other, 1_000)
    session.commit()
    WAYS[way](session, hold)
    assert session.execute(text(_READ)).all() == []
    session.rollback()
