"""The API in this process, on the test's own database, with tokens as a host issues them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient

from tests.support.api import SECRET
from trueup.settings.settings import get_settings
from trueup.worker.http import create_app

MakeClient = Callable[..., TestClient]


@pytest.fixture
def client_with(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeClient]:
    """A client of an API with these settings: `client_with(issuer="shop")`.

    By default a key is configured and the rate limit is off: the tests share a Redis, and their users have equal ids.
    """
    with ExitStack() as stack:

        def make(**settings: object) -> TestClient:
            for name, value in ({"jwt_secret": SECRET, "rate_limit_per_minute": 0} | settings).items():
                if value is not None:
                    monkeypatch.setenv(f"TRUEUP_API__{name.upper()}", str(value))
            get_settings.cache_clear()
            app = create_app()
            stack.callback(app.state.celery.close)
            client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
            return stack.enter_context(client)

        yield make


@pytest.fixture
def client(client_with: MakeClient) -> TestClient:
    return client_with()
