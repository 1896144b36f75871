"""The connections of the metered clients.

All synchronous clients of a process share their connections, so that a task which makes a client of its own does not
connect again. An asynchronous client has its own, for each event loop.
"""

import asyncio
import atexit
import os
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.request import getproxies, proxy_bypass

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
        self._trust_env = trust_env and "proxy" not in options
        self._own: dict[str | None, Any] = {}
        self._by_loop: dict[asyncio.AbstractEventLoop, dict[str | None, Any]] = {}

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
        loop = asyncio.get_running_loop()
        for other in [other for other in self._by_loop if other.is_closed()]:
            del self._by_loop[other]
        own, proxy = self._by_loop.setdefault(loop, {}), self._proxy_for(url)
        if proxy not in own:
            own[proxy] = self._http.AsyncHTTPTransport(**self._with(proxy))
        return own[proxy]

    def close(self) -> None:
        """Close the connections that are this client's alone."""
        for transport in (*self._own.values(), *(() if self._inner is None else (self._inner,))):
            transport.close()
        self._own = {}

    async def aclose(self) -> None:
        """Do as `close`, for the running event loop."""
        own = self._by_loop.pop(asyncio.get_running_loop(), {})
        for transport in (*own.values(), *(() if self._inner is None else (self._inner,))):
            await transport.aclose()

    def _with(self, proxy: str | None) -> dict[str, Any]:
        found = {} if proxy is None else {"proxy": proxy}
        return {"verify": _tls(self._http, os.getpid())} | found | self._options

    def _proxy_for(self, url: Any) -> str | None:
        """Return the proxy that the environment names for a URL: a client with a transport does not look there."""
        if not self._trust_env:
            return None
        proxies = getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if not proxy or proxy_bypass(url.host):
            return None
        return proxy if "://" in proxy else f"http://{proxy}"


_shared_transports: dict[tuple[str, str | None], Any] = {}
_shared_lock = threading.Lock()


def _shared(http: Any, proxy: str | None) -> Any:
    with _shared_lock:
        found = _shared_transports.get((http.__name__, proxy))
        if found is None:
            more = {} if proxy is None else {"proxy": proxy}
            found = http.HTTPTransport(verify=_tls(http, os.getpid()), **more)
            _shared_transports[(http.__name__, proxy)] = found
        return found


@lru_cache(maxsize=2)
def _tls(http: Any, pid: int) -> Any:
    """Return the library's TLS settings in process `pid`. To read the certificates takes 20 ms."""
    return http.create_ssl_context()


@atexit.register
def _close_shared() -> None:
    """Close the shared connections when the process ends."""
    for transport in _shared_transports.values():
        with suppress(Exception):  # a thread may still use it
            transport.close()


def _forget_parents_connections() -> None:
    """A forked child must not share its parent's connections."""
    global _shared_transports, _shared_lock
    _shared_transports, _shared_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_parents_connections)
