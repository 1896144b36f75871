"""A request that got no answer: whether a server may have worked on it all the same, and bills it."""

from functools import lru_cache
from typing import Any

# Statuses of a server that certainly did not work on the request. After any other 5xx it may have, and a proxy that
# answers for it does not know.
_NOT_SERVED = frozenset((501, 503, 529))

# Errors of the HTTP libraries that are raised before the request was sent. After any other the server may have read the
# whole request before the connection broke.
_NEVER_SENT = (
    "ConnectError",  # connection refused, unknown host name, or failed TLS handshake
    "ConnectTimeout",
    "PoolTimeout",
    "ProxyError",
    "UnsupportedProtocol",
    "LocalProtocolError",
    "TooManyRedirects",
)


def may_be_billed(status: int) -> bool:
    """Return whether a refusal with this HTTP status may cost tokens."""
    return status >= 500 and status not in _NOT_SERVED


@lru_cache(maxsize=2)
def never_sent(http: Any) -> tuple[type[Exception], ...]:
    """Return the errors of an HTTP library, a module, after which no server can have the request."""
    return tuple(getattr(http, name) for name in _NEVER_SENT)
