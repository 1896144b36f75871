"""The number by which the gates of one user stand in line belongs to no role: another role may take it and keep it."""

import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.gate.holds import close_hold


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
