"""Which URLs are accepted for trueup's own queues and results, and what each other broker lacks."""

_ACCEPTED = ("redis", "rediss", "redis+socket", "sentinel")
_EXAMPLE = "redis://:password@host:6379/0"

_RABBITMQ = (
    "trueup's own workers use Redis and not RabbitMQ: results, rate limits and the queue depths of `trueup doctor` are "
    "read from Redis. "
    f"Give a Redis URL: {_EXAMPLE}. Your own Celery application may keep RabbitMQ: its metered tasks need no broker of "
    "trueup's"
)
_CLUSTER = (
    "Celery's queues don't work on a Redis Cluster, because one transaction would need keys on several nodes. Give a "
    f"single Redis ({_EXAMPLE}) or Sentinels (sentinel://host:26379;sentinel://host2:26379)"
)
_REFUSED = {
    "amqp": _RABBITMQ,
    "amqps": _RABBITMQ,
    "pyamqp": _RABBITMQ,
    "rediscluster": _CLUSTER,
    "redis_cluster": _CLUSTER,
    "redis+cluster": _CLUSTER,
    "redis-cluster": _CLUSTER,
    "redis+sentinel": "write sentinel://host:26379;sentinel://host2:26379",
    "redis-sentinel": "write sentinel://host:26379;sentinel://host2:26379",
    "valkey": "write redis:// for Valkey too",
    "valkeys": "write rediss:// for Valkey too",
}


def is_sentinel(url: str) -> bool:
    """Return whether the URL names Sentinels, of which one tells which Redis is the master."""
    return url.startswith("sentinel://")


def check_redis_url(url: str) -> None:
    """Raise ValueError for a URL of a broker on which trueup's own queues or results don't work, and say why."""
    for one in url.split(";"):
        scheme = one.partition("://")[0].lower()
        if scheme not in _ACCEPTED:
            raise ValueError(_REFUSED.get(scheme, f"give a Redis URL: {_EXAMPLE}"))
