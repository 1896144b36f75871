"""How a heartbeat keeps holds: what it renews, for how long, and whose holds it leaves alone."""

import pytest
from sqlalchemy import Connection

from tests.support.host import Host, after
from tests.support.sessions import locked
from tests.support.work import hold_tokens
from trueup.errors import HoldBusyError
from trueup.gate.holds import Hold, close_hold, expire_holds, keep_holds

LEASE = 30


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(1_000)


def deliver(connection: Connection, user: int, seconds: float = 0) -> Hold:
    """Deliver the task `t` that long after NOW."""
    return hold_tokens(connection, user, 600, task="t", lease=LEASE, ttl=600, now=after(seconds))


def keep(connection: Connection, hold: Hold, seconds: float, *, most: float = 3_600) -> int:
    return keep_holds(connection, [hold], lease_seconds=LEASE, ttl_seconds=600, max_seconds=most, now=after(seconds))


def test_a_heartbeat_renews_lease_and_expiry(host: Host, connection: Connection, user: int) -> None:
    hold = deliver(connection, user)
    assert keep(connection, hold, 500) == 1
    assert expire_holds(connection, now=after(1_099)) == (0, 0)
    with pytest.raises(HoldBusyError):
        deliver(connection, user, 500 + LEASE - 1)
    assert expire_holds(connection, now=after(1_100)) == (1, 600)


def test_a_heartbeat_keeps_a_hold_no_longer_than_it_may_live(host: Host, connection: Connection, user: int) -> None:
    hold = deliver(connection, user)
    assert [keep(connection, hold, seconds, most=100) for seconds in (99, 100)] == [1, 0]


def test_a_heartbeat_does_not_touch_a_hold_that_has_ended_or_that_another_attempt_has(
    host: Host, connection: Connection, user: int
) -> None:
    first = deliver(connection, user)
    second = deliver(connection, user, LEASE)
    assert [keep(connection, hold, LEASE + 1) for hold in (first, second)] == [0, 1]
    close_hold(connection, second, now=after(LEASE + 2))
    assert keep(connection, second, LEASE + 3) == 0


def test_a_heartbeat_waits_for_nobody(host: Host, connection: Connection, user: int) -> None:
    hold = deliver(connection, user)
    with locked(host, "SELECT * FROM trueup.hold FOR UPDATE"):
        assert keep(connection, hold, 1) == 0
    assert keep(connection, hold, 1) == 1
