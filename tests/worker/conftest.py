"""One worker for a whole module of tests: booting one takes seconds. Its tests use users of their own."""

from collections.abc import Iterator

import pytest
from celery import Celery
from sqlalchemy import Engine

from tests.conftest import cloned_database, settings_for
from tests.support.host import Host, host_of
from tests.support.worker import WorkerProcess, close_connections, own_application, running_worker
from trueup.stack import StackUrls

TASKS = "tests.support.model_tasks"


@pytest.fixture(scope="module")
def shared_database(
    stack: StackUrls, admin_engine: Engine, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database for all tests of a module. Gives its URL."""
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        cloned_database(stack, admin_engine, template_database) as url,
        settings_for(url, stack, monkeypatch, tmp_path_factory.mktemp("shared")),
    ):
        yield url


@pytest.fixture(scope="module")
def shared_host(shared_database: str) -> Iterator[Host]:
    with host_of(shared_database) as host:
        yield host


@pytest.fixture(scope="module")
def app(shared_database: str) -> Iterator[Celery]:
    """The application, with the session's Redis as its broker and no messages in the queues."""
    app = own_application()
    app.control.purge()
    yield app
    close_connections(app)


@pytest.fixture(scope="module")
def worker(app: Celery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with running_worker(log, queues=("trueup-ai", "trueup-reconcile"), include=(TASKS,)) as worker:
        yield worker
