"""A host's own Celery application on RabbitMQ, with a metered task: `celery -A tests.support.amqp_shop worker`."""

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from tests.support.model_tasks import ask
from trueup.accounts.user_ids import UserId
from trueup.llm.model import Model
from trueup.tasks import metered_task

BROKER, RESULTS, QUEUE, DOOR = "SHOP_BROKER_URL", "SHOP_RESULTS_URL", "SHOP_QUEUE", "SHOP_DOOR"
"""Variables: the two URLs, the queue (see `queue_of`), and a file."""


def queue_of(words: str) -> Queue:
    """Return the shop's queue: its name and its kind, and for a quorum queue maybe its delivery limit.

    `words`: such as "shop1 classic", "shop2 quorum" or "shop3 quorum 2". Messages beyond the limit go to the queue
    `shop3-dead`.
    """
    name, kind, *limit = words.split()
    arguments: dict[str, Any] = {"x-queue-type": kind}
    if limit:
        arguments |= {
            "x-delivery-limit": int(limit[0]),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead_letters_of(name),
        }
    # Celery delays the messages of quorum queues by topic exchanges.
    exchange = Exchange(f"{name}-in", type="topic" if kind == "quorum" else "direct")
    return Queue(name, exchange, routing_key=name, queue_arguments=arguments)


def dead_letters_of(queue: str) -> str:
    return f"{queue}-dead"


def make_shop(broker: str, results: str, words: str, *, current: bool) -> Celery:
    queue = queue_of(words)
    shop = Celery("shop", broker=broker, backend=results, set_as_current=current)
    shop.conf.task_queues = [queue]
    shop.conf.task_default_queue = queue.name
    shop.conf.task_default_exchange = queue.exchange.name
    shop.conf.task_default_exchange_type = queue.exchange.type
    shop.conf.task_default_routing_key = queue.routing_key
    shop.conf.worker_prefetch_multiplier = 1
    shop.conf.broker_connection_retry_on_startup = True
    shop.conf.worker_cancel_long_running_tasks_on_connection_loss = False
    shop.conf.task_track_started = True
    return shop


if BROKER in os.environ:
    app = make_shop(os.environ[BROKER], os.environ[RESULTS], os.environ[QUEUE], current=True)


@metered_task(name="shop.describe", feature_name="Shop", section="chat", estimated_tokens=100)
def describe(model: Model, user_id: UserId) -> int:
    """Spend on one call, then wait until the shop's door is open. Returns the tokens spent."""
    tokens = ask(model, 10)
    while not Path(os.environ[DOOR]).exists():
        time.sleep(0.05)
    return tokens
