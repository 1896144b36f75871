"""The state of the queues and workers for the live page, read through the application that sends trueup's tasks."""

from collections import Counter

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from trueup.errors import ServiceUnavailableError
from trueup.monitoring.broker import BrokerState, QueueState
from trueup.tasks.queues import AI_QUEUE, RECONCILE_QUEUE
from trueup.worker.dead_letters import count_letters
from trueup.worker.doctor import read_queue_depth

ANSWER_SECONDS = 1.0


def read_broker(app: Celery) -> BrokerState:
    """Return the queues and the workers that answer within `ANSWER_SECONDS`. Raises `ServiceUnavailableError`."""
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=0, timeout=ANSWER_SECONDS)
            client = connection.default_channel.client
            depths = {queue: read_queue_depth(client, queue) for queue in (AI_QUEUE, RECONCILE_QUEUE)}
            letters = count_letters(client)
        replies = app.control.broadcast("active_queues", reply=True, timeout=ANSWER_SECONDS) or []
    except (OperationalError, RedisError, OSError) as error:
        raise ServiceUnavailableError("Redis", "TRUEUP_BROKER_URL", str(error).rstrip(".")) from error
    taken = [(name, queues) for reply in replies for name, queues in reply.items()]
    consumers = Counter(queue["name"] for _, queues in taken for queue in queues)
    return BrokerState(
        queues=tuple(
            QueueState(
                name=queue, length=depth.length, oldest_seconds=depth.oldest_seconds, workers=consumers.get(queue, 0)
            )
            for queue, depth in depths.items()
        ),
        workers=tuple(sorted(name for name, _ in taken)),
        dead_letters=letters,
    )
