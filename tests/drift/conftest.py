"""Fixtures of the tests of explaining drifts."""

import pytest
from sqlalchemy import Connection

from tests.support.findings import forget_journal
from tests.support.host import Host
from tests.support.two_books import Books


@pytest.fixture
def template_database(request: pytest.FixtureRequest, plain_template: str) -> str:
    """The template of `database`, with the rows of `books` and `journaled` for a test that uses one of them."""
    if {"books", "journaled"} & set(request.fixturenames):
        template: str = request.getfixturevalue("mapped_template")
        return template
    return plain_template


@pytest.fixture
def books(host: Host, connection: Connection) -> Books:
    """A subscriber of a host whose decrement rows and payments are mapped, before the journal begins."""
    forget_journal(host)
    return Books(host, connection)


@pytest.fixture
def journaled(host: Host, connection: Connection) -> Books:
    """The same, with the journal. Its entries have the time of the server's clock."""
    return Books(host, connection)
