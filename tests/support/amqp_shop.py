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
"""Variables: the two URLs, the queue ("classic", "quorum", or with a delivery limit "quorum:2"), and a file."""


def queue_of(kind: str) -> Queue:
    """Return the shop's queue. A quorum queue sends messages beyond its limit to the queue `dead`."""
    kind, _, limit = kind.partition(":")
    arguments: dict[str, Any] = {"x-queue-type": kind}
    if limit:
        arguments |= {
            "x-delivery-limit": int(limit),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "dead",
        }
    # Celery delays the messages of quorum queues by topic exchanges.
    name = f"shop-{kind}{limit}"
    exchange = Exchange(f"{name}-in", type="topic" if kind == "quorum" else "direct")
    return Queue(name, exchange, routing_key=name, queue_arguments=arguments)


def make_shop(broker: str, results: str, kind: str, *, current: bool) -> Celery:
    queue = queue_of(kind)
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
