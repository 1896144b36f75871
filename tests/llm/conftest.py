from collections.abc import Iterator

import pytest

from tests.support.wire import Wire, wire_server


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wire_server() as wire:
        yield wire
