"""kombu's Redis transport, with one crash mended.

In kombu 5.7.0 a worker whose Redis goes away for some seconds, while a late-acknowledged message is in work, may touch
a channel whose connection has been collected already. That ends the worker with an AttributeError, where a
ConnectionError would have made it reconnect. A fault test in tests/worker keeps watch: when it passes without this,
delete this.
"""

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import ConnectionError as RedisConnectionError


class Channel(redis.Channel):
    """A channel that reports a lost connection as one."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the channel's connection is gone")
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
        return params


class Transport(redis.Transport):
    """The Redis transport with that channel."""

    Channel = Channel


def register() -> None:
    """Let every redis:// and rediss:// broker URL of this process use this transport."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
