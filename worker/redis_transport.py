"""kombu's Redis transport with a fix for one crash.

With kombu 5.7.0, when Redis is away for some seconds while a task with a late acknowledgement runs, the worker may use
a channel whose connection was garbage-collected. The AttributeError ends the worker. A ConnectionError makes it
reconnect.
Delete this module when tests/worker/test_broker_loss.py passes without it.
"""

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import ConnectionError as RedisConnectionError


class Channel(redis.Channel):
    """A channel that raises ConnectionError when its connection is lost."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the channel has lost its connection")
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
        return params


class Transport(redis.Transport):
    """The Redis transport with the fixed channel."""

    Channel = Channel


def register() -> None:
    """Use this transport for every redis:// and rediss:// broker URL of this process."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
