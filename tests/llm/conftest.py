from collections.abc import Iterator

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.wire import Wire, wire_server
from tests.support.work import hold_tokens
from trueup.llm.running import RunningHold, spending_from
from trueup.llm.transport.purchases import forget_usage_refusers

ENOUGH_TOKENS = 20_000_000


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wire_server() as wire:
        yield wire


@pytest.fixture
def spending(host: Host, connection: Connection) -> Iterator[RunningHold]:
    """The test's model calls spend from a hold that covers them all."""
    forget_usage_refusers()
    user = host.subscriber(ENOUGH_TOKENS)
    with spending_from(hold_tokens(connection, user, ENOUGH_TOKENS, lease=600)) as running:
        yield running
