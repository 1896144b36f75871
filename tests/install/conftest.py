"""What tests of reconciling and of attaching share."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from billing.host_tables import build_host_metadata
from billing.install import install
from billing.mapping import HostMapping
from tests.support.host import Host
from tests.support.two_books import MAPPED, Books


@pytest.fixture
def bare_host(empty_database: str) -> Iterator[Host]:
    """A host from before trueup."""
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
    with Host(engine) as host:
        yield host
    engine.dispose()


@pytest.fixture
def books(host: Host, connection: Connection) -> Books:
    """A subscriber of a host whose decrement rows and payments are mapped."""
    with host.engine.begin() as mapping:
        install(mapping, MAPPED, with_host_tables=True)
    return Books(host, connection)
