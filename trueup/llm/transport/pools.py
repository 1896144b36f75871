"""The connections of the metered clients.

All clients of a process share their connections, so that a task which makes a client of its own does not connect again:
synchronous clients by process, asynchronous ones by event loop, until the last one on the loop is closed.
"""

import asyncio
import atexit
import os
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

# Options of a client that concern its connections. A client with one of these has connections of its own.
CONNECTION_OPTIONS = frozenset(("verify", "cert", "http1", "http2", "limits", "proxy"))


class Pools:
    """The transports that send one client's requests.

    `http`: the HTTP library. `inner`: the caller's own transport. `options`: of the connections; empty: shared.
    """

    def __init__(self, http: Any, inner: Any, options: dict[str, Any], *, trust_env: bool) -> None:
        self._http = http
        self._inner = inner
        self._options = options
        # Read once, as the HTTP libraries' own clients do: each look costs a third of a millisecond.
        self._proxies = getproxies() if trust_env and "proxy" not in options else {}
        self._own: dict[str | None, Any] = {}
        self._by_loop: dict[asyncio.AbstractEventLoop, _LoopConnections] = {}

    def sync_for(self, url: Any) -> Any:
        """Return the transport for a URL."""
        if self._inner is not None:
            return self._inner
        proxy = self._proxy_for(url)
        if not self._options:
            return _shared(self._http, proxy)
        if proxy not in self._own:
            self._own[proxy] = self._http.HTTPTransport(**self._with(proxy))
        return self._own[proxy]

    def async_for(self, url: Any) -> Any:
        """Return the transport for a URL on the running event loop."""
        if self._inner is not None:
            return self._inner
        known = _of_running_loop(self._by_loop if self._options else _shared_by_loop)
        known.users.add(self)
        place = (self._http.__name__, self._proxy_for(url))
        if place not in known.transports:
            known.transports[place] = self._http.AsyncHTTPTransport(**self._with(place[1]))
        return known.transports[place]

    def close(self) -> None:
        """Close the connections that no other client may use."""
        for transport in (*self._own.values(), *(() if self._inner is None else (self._inner,))):
            transport.close()
        self._own = {}

    async def aclose(self) -> None:
        """Do as `close`, for the running event loop."""
        loop = asyncio.get_running_loop()
        for loops in (self._by_loop, _shared_by_loop):
            known = loops.get(loop)
            if known is None:
                continue
            known.users.discard(self)
            if not known.users:
                del loops[loop]
                for transport in known.transports.values():
                    await transport.aclose()
        if self._inner is not None:
            await self._inner.aclose()

    def _with(self, proxy: str | None) -> dict[str, Any]:
        return _common_options(self._http, proxy) | self._options

    def _proxy_for(self, url: Any) -> str | None:
        """Return the environment's proxy for a URL. A client that is given a transport does not look for it."""
        proxy = self._proxies.get(url.scheme) or self._proxies.get("all")
        if not proxy or proxy_bypass(url.host):
            return None
        return proxy if "://" in proxy else f"http://{proxy}"


class _LoopConnections:
    """The transports of one event loop, and the clients that have used them and are not closed."""

    def __init__(self) -> None:
        self.transports: dict[tuple[str, str | None], Any] = {}
        self.users: WeakSet[Pools] = WeakSet()


# An event loop uses its own entry alone, and adding an entry is atomic.
_shared_by_loop: dict[asyncio.AbstractEventLoop, _LoopConnections] = {}


def _of_running_loop(loops: dict[asyncio.AbstractEventLoop, _LoopConnections]) -> _LoopConnections:
    """Return the running loop's connections. Those of loops that have ended are dropped."""
    for other in [other for other in tuple(loops) if other.is_closed()]:
        loops.pop(other, None)
    return loops.setdefault(asyncio.get_running_loop(), _LoopConnections())


_shared_transports: dict[tuple[str, str | None], Any] = {}
_shared_lock = threading.Lock()


def _shared(http: Any, proxy: str | None) -> Any:
    with _shared_lock:
        found = _shared_transports.get((http.__name__, proxy))
        if found is None:
            found = http.HTTPTransport(**_common_options(http, proxy))
            _shared_transports[(http.__name__, proxy)] = found
        return found


@lru_cache(maxsize=2)
def _tls(http: Any, pid: int) -> Any:
    """Return the library's TLS settings in process `pid`. To read the certificates takes 20 ms."""
    return http.create_ssl_context()


def _common_options(http: Any, proxy: str | None) -> dict[str, Any]:
    """Return the options of connections that all clients have."""
    # The makers' own limits. Those of the HTTP libraries are for fewer streams at once.
    limits = http.Limits(max_connections=1_000, max_keepalive_connections=100)
    options = {"verify": _tls(http, os.getpid()), "limits": limits}
    return options if proxy is None else options | {"proxy": proxy}


@atexit.register
def _close_shared() -> None:
    """Close the shared connections when the process ends."""
    for transport in _shared_transports.values():
        with suppress(Exception):  # a thread may still use it
            transport.close()


def _forget_parents_connections() -> None:
    """A forked child must not share its parent's connections."""
    global _shared_transports, _shared_lock, _shared_by_loop
    _shared_transports, _shared_lock, _shared_by_loop = {}, threading.Lock(), {}


os.register_at_fork(after_in_child=_forget_parents_connections)
