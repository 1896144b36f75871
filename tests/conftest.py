"""Real servers for the tests: one embedded stack for a session, one database for a test, cloned from a template."""

import contextlib
import gc
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.stack.helpers import temporary_home
from tests.support.demo import demo  # noqa: F401 - a fixture
from tests.support.host import Host, host_of, pooled_engine
from tests.support.postgres_versions import GIVEN, running_server
from tests.support.two_books import MAPPED
from trueup.database.engine import connect, dispose_engine
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.settings.settings import Settings, get_settings
from trueup.stack import StackUrls, running_stack

TEMPLATE = "trueup_template"


# Rooms whose files take longest, on real processes. If one of these started last, it would run alone.
FIRST = ("faults", "worker", "stack", "hosts", "install", "cli")


def pytest_sessionstart() -> None:
    """Collect no garbage while tests are collected: a million objects are made, and nearly all of them stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: `--no-loadscope-reorder` keeps the order in which files are given to processes."""

    def place(item: pytest.Item) -> int:
        room, _, rest = item.nodeid.removeprefix("tests/").partition("/")
        return FIRST.index(room) if room in FIRST else -1 if not rest else len(FIRST)

    items.sort(key=place)


def url_of_database(url: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """Restore SIGINT, which shells ignore in background jobs. The tests' commands would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> None:
    """The developer's own settings must not reach the tests."""
    for variable in [name for name in os.environ if name.startswith("TRUEUP_")]:
        del os.environ[variable]


def _memory_with_room() -> Path | None:
    """Return a folder in memory if there is one. A database for each test takes ten times as long on ext4."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes the folder inside
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**30 else None


def _moved_clock(folder: Path) -> dict[str, str]:
    """Return the variables that give the embedded servers the tests' clock, if tests/test_moments.py moves it.

    The servers inherit no variables. Their account may be unable to read the library, so it gets a copy in `folder`.
    """
    library = os.environ.get("LD_PRELOAD")
    if not library or "FAKETIME" not in os.environ:
        return {}
    copy = shutil.copy(library, folder / "libfaketime.so")
    os.chmod(copy, 0o644)
    return {name: value for name, value in os.environ.items() if name.startswith("FAKETIME")} | {
        "LD_PRELOAD": str(copy)
    }


@pytest.fixture(scope="session")
def stack(_no_settings_from_outside: None) -> Iterator[StackUrls]:
    """A real PostgreSQL and a real Redis for this test session."""
    with temporary_home(_memory_with_room()) as home, contextlib.ExitStack() as servers:
        other = servers.enter_context(running_server(GIVEN[0], home)) if GIVEN else None
        settings = Settings(home=home, database_url=other)
        yield servers.enter_context(running_stack(settings, environment=_moved_clock(home.parent)))


@pytest.fixture(scope="session")
def admin_engine(stack: StackUrls) -> Iterator[Engine]:
    """An engine to create and drop databases."""
    assert stack.database_url is not None
    engine = pooled_engine(url_of_database(stack.database_url, "postgres")).execution_options(
        isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        # A change of the host's tables closes the gate at once instead of within a second.
        connection.execute(text("ALTER ROLE CURRENT_USER SET trueup.recount_after = '0'"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def plain_template(stack: StackUrls, admin_engine: Engine) -> str:
    """A database with the host's tables and trueup's, made once."""
    assert stack.database_url is not None
    with admin_engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {TEMPLATE}"))
    engine = create_engine(url_of_database(stack.database_url, TEMPLATE), poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, HostMapping(), with_host_tables=True)
    engine.dispose()
    return TEMPLATE


@pytest.fixture(scope="session")
def mapped_template(stack: StackUrls, admin_engine: Engine, plain_template: str) -> Iterator[str]:
    """The same for a host that keeps rows of its decrements and payments."""
    with template_for(stack, admin_engine, plain_template, MAPPED) as name:
        yield name


@pytest.fixture(scope="session")
def template_database(plain_template: str) -> str:
    """The template of `database`. A module whose tests all need another one overrides this fixture."""
    return plain_template


@contextlib.contextmanager
def template_for(
    stack: StackUrls, admin_engine: Engine, template: str, mapping: HostMapping, *statements: str
) -> Iterator[str]:
    """Give the name of a copy of a template, changed by the host's statements and set up for another mapping.

    A clone of it costs a test a small part of such a setup.
    """
    with cloned_database(stack, admin_engine, template) as url:
        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))
            install(connection, mapping, with_host_tables=True)
        engine.dispose()
        yield urlsplit(url).path.removeprefix("/")


@contextlib.contextmanager
def cloned_database(
    stack: StackUrls, admin_engine: Engine, template: str, *, used: list[str] | None = None
) -> Iterator[str]:
    """Give the URL of a new database. At the end it is dropped with all its sessions.

    With `used`, it is added to that list instead, and dropped when a later database is made: by then its sessions have
    ended. If one is still ending, PostgreSQL sleeps for 100 ms.
    """
    assert stack.database_url is not None
    name = f"test_{uuid.uuid4().hex[:12]}"
    while used is not None and len(used) > 2:
        _drop_database(admin_engine, used.pop(0))
    with admin_engine.connect() as connection:
        # Copying a small template's files takes half as long as logging its pages. Servers before 15 always copy.
        strategy = "STRATEGY file_copy" if connection.dialect.server_version_info >= (15,) else ""
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template} {strategy}"))
    try:
        yield url_of_database(stack.database_url, name)
    finally:
        if used is None:
            _drop_database(admin_engine, name)
        else:
            used.append(name)


def _drop_database(admin_engine: Engine, name: str) -> None:
    with admin_engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def used_databases() -> list[str]:
    """The databases of tests that have ended, until they are dropped. The last ones go with the server."""
    return []


@pytest.fixture
def empty_database(
    stack: StackUrls,
    admin_engine: Engine,
    used_databases: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[str]:
    """An empty database, to which this process's settings point."""
    with (
        cloned_database(stack, admin_engine, "template1", used=used_databases) as url,
        settings_for(url, stack, monkeypatch, tmp_path),
    ):
        yield url


@pytest.fixture
def database(
    stack: StackUrls,
    admin_engine: Engine,
    template_database: str,
    used_databases: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[str]:
    """A database ready for trueup, to which this process's settings point. Gives its URL."""
    with (
        cloned_database(stack, admin_engine, template_database, used=used_databases) as url,
        settings_for(url, stack, monkeypatch, tmp_path),
    ):
        yield url


@contextlib.contextmanager
def settings_for(url: str, stack: StackUrls, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
    """Point this process's settings, and those of its children, to a database and the session's Redis.

    The model provider is `offline`, because none is assumed with a database of the user's own.
    """
    assert stack.broker_url is not None
    monkeypatch.setenv("TRUEUP_DATABASE_URL", url)
    monkeypatch.setenv("TRUEUP_BROKER_URL", stack.broker_url)
    monkeypatch.setenv("TRUEUP_HOME", str(home / "home"))
    monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "offline")
    get_settings.cache_clear()
    try:
        yield
    finally:
        dispose_engine()
        get_settings.cache_clear()


@pytest.fixture
def host(database: str) -> Iterator[Host]:
    """The host application, with its own connection and its own SQL, independent of trueup."""
    with host_of(database) as host:
        yield host


@pytest.fixture
def connection(host: Host) -> Iterator[Connection]:
    """trueup's connection, on which each statement is its own transaction."""
    with connect() as connection:
        yield connection
