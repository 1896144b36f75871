"""The line in which operations on one user's balance wait. Any role may take a user's number in it, and keep it."""

import uuid
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from tests.support.host import Host
from tests.support.sessions import backend_pid, in_background, wait_for_lock
from tests.support.work import charge_tokens, hold_tokens
from trueup.gate.holds import Hold, close_hold
from trueup.gate.provider_calls import extend_hold

OPERATIONS: dict[str, Callable[[Connection, Hold], object]] = {
    "a hold is opened": lambda session, hold: hold_tokens(session, hold.user_id, 10),
    "it is extended": lambda session, hold: extend_hold(session, hold, 10),
    "it is charged": lambda session, hold: charge_tokens(session, hold, 10),
    "it is closed": lambda session, hold: close_hold(session, hold),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("is_busy", [True, False])
def test_an_operation_stands_in_line_only_while_another_one_of_its_user_runs(
    host: Host, connection: Connection, operation: Callable[[Connection, Hold], object], is_busy: bool
) -> None:
    user, other = host.subscriber(1_000), host.subscriber(1_000)
    hold = hold_tokens(connection, user, 100)
    with in_background() as submit, host.engine.connect() as leader, host.engine.connect() as follower:
        hold_tokens(leader, user if is_busy else other, 100)
        follower.execute(text("SET LOCAL track_functions = 'all'"))
        pid = backend_pid(follower)
        following = submit(operation, follower, hold)
        if is_busy:
            wait_for_lock(host, pid)
            leader.commit()
        following.result()
        called = follower.scalars(text("SELECT funcname FROM pg_stat_xact_user_functions")).all()
    assert ("wait_for_turn" in called) is is_busy


@pytest.fixture
def stranger(host: Host, database: str) -> Iterator[Engine]:
    """Connections of a role that may do nothing but connect."""
    name = f"stranger_{uuid.uuid4().hex[:8]}"
    host.execute(f"CREATE ROLE {name} LOGIN")
    engine = create_engine(make_url(database).set(username=name), poolclass=NullPool)
    yield engine
    engine.dispose()
    host.execute(f"DROP ROLE {name}")


def test_a_stranger_who_keeps_a_users_number_delays_its_gate_and_does_not_stop_it(
    host: Host, stranger: Engine, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    with stranger.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(1953658213, hashtext(CAST(:user AS text)))"), {"user": user})
        hold = hold_tokens(connection, user, 100)
        charge_tokens(connection, hold, 60)
        assert close_hold(connection, hold, completed=True) == "settled"
    assert (host.counter(user), host.used(user)) == (940, 60)
