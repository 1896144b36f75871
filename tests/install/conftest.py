"""Fixtures of the tests of installing and attaching."""

from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.support.host import Host
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata


@pytest.fixture
def bare_host(empty_database: str) -> Iterator[Host]:
    """A host without trueup."""
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
    with Host(engine) as host:
        yield host
    engine.dispose()
