"""Fixtures of the tests of explaining drifts."""

import pytest
from sqlalchemy import Connection

from tests.support.findings import forget_journal
from tests.support.host import Host
from tests.support.two_books import MAPPED, Books
from trueup.install.install import install


@pytest.fixture
def books(host: Host, connection: Connection) -> Books:
    """A subscriber of a host whose decrement rows and payments are mapped, before the journal begins."""
    with host.engine.begin() as mapping:
        install(mapping, MAPPED, with_host_tables=True)
    forget_journal(host)
    return Books(host, connection)


@pytest.fixture
def journaled(host: Host, connection: Connection) -> Books:
    """The same, with the journal. Its entries have the time of the server's clock."""
    with host.engine.begin() as mapping:
        install(mapping, MAPPED, with_host_tables=True)
    return Books(host, connection)
