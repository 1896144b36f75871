from collections.abc import Iterator

import pytest

from tests.support.makers import Maker, maker_server


@pytest.fixture
def maker() -> Iterator[Maker]:
    """A server in the makers' wire formats, with a ledger."""
    with maker_server() as maker:
        yield maker
