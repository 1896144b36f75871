"""For tests of the API: tokens as a host issues them, a clock, a free port."""

import socket
import time
from typing import Any

import jwt

SECRET = "a secret that the host signs its tokens with, long enough for any of the HMACs"
OPERATOR = "trueup:operator"


def token(user_id: object = None, *, key: Any = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a token of the user that is valid for a day: a test may use it long after its module was read.

    A claim of None is left out.
    """
    content = {"user_id": user_id, "exp": int(time.time()) + 86_400} | {
        name: value for name, value in claims.items() if name != "headers"
    }
    content = {name: value for name, value in content.items() if value is not None}
    return jwt.encode(content, key, algorithm=algorithm, headers=claims.get("headers"))


def bearer(user_id: object = None, **claims: Any) -> dict[str, str]:
    """Return the header with such a token."""
    return {"Authorization": f"Bearer {token(user_id, **claims)}"}


def free_port() -> int:
    """Return a port of this machine on which no server listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Clock:
    """A replacement for `time.monotonic` that advances only when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def go_on(self, seconds: float) -> None:
        self.now += seconds
