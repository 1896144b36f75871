"""Fixtures of the tests of installing and attaching."""

from collections.abc import Iterator

import pytest

from tests.support.host import Host, pooled_engine
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata


@pytest.fixture
def bare_host(empty_database: str) -> Iterator[Host]:
    """A host without trueup."""
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
    with Host(engine) as host:
        yield host
    engine.dispose()
