"""kombu's Sentinel transport, with the fixes of trueup's Redis transport."""

from kombu.transport import redis

from trueup.worker.redis_transport import Channel


class SentinelChannel(Channel, redis.SentinelChannel):
    """trueup's channel, which asks the Sentinels for the master whenever it connects."""


class Transport(redis.SentinelTransport):
    """The Sentinel transport with the fixed channel."""

    Channel = SentinelChannel
