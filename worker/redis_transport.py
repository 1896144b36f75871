"""kombu's Redis transport, with fixes for two faults that end a worker.

An unreadable message ends a worker of Celery 5.7, and each worker that starts after it. Here it becomes a dead letter
before kombu sees it. So does a message at which Celery fails for any other reason, or whose task the worker lacks.

With kombu 5.7.0, when Redis is away for some seconds while a task with a late acknowledgement runs, the worker may use
a channel whose connection was garbage-collected. The AttributeError ends the worker. A ConnectionError makes it
reconnect.
Delete this module when tests/worker/test_broker_loss.py passes without it.
"""

import json
import logging
from typing import Any

from celery.signals import task_rejected, task_unknown
from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from trueup.worker.dead_letters import keep_letter
from trueup.worker.messages import find_problem

logger = logging.getLogger(__name__)

_SHOWN = 500


class Channel(redis.Channel):
    """A channel that raises ConnectionError when its connection is lost, and delivers only readable tasks.

    Tasks are the messages that a consumer acknowledges. Answers of remote control and results have no acknowledgement
    and another form: they are delivered unchecked.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._task_queues: set[str] = set()
        super().__init__(*arguments, **options)  # type: ignore[no-untyped-call]

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the channel has lost its connection")
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
        return params

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
        parse = client.parse_response

        def parse_response(connection: Any, command: str, **options: Any) -> Any:
            reply = parse(connection, command, **options)
            return self._readable(reply) if command == "BRPOP" and reply else reply

        client.parse_response = parse_response
        return client

    def _readable(self, reply: tuple[bytes, bytes]) -> tuple[bytes, bytes] | None:
        """Return the message taken from a queue; None, as for empty queues, for a task that no worker can read."""
        key, message = reply
        queue = key.decode().rsplit(self.sep, 1)[0]  # a list's name has the priority after the queue's name
        problem = find_problem(message) if queue in self._task_queues else None
        if problem is None:
            return reply
        self.bury(key.decode(), message, problem)
        return None

    def bury(self, queue: str, message: bytes, reason: str) -> None:
        """Keep a message as a dead letter. `queue`: the list that it came from."""
        logger.error(
            "message not readable, kept as a dead letter queue=%s reason=%s message=%r", queue, reason, message[:_SHOWN]
        )
        with self.conn_or_acquire() as client:
            keep_letter(client, queue, message, reason)

    def basic_consume(self, queue: str, no_ack: bool = False, *arguments: Any, **options: Any) -> Any:
        if not no_ack:
            self._task_queues.add(queue)
        consumed = super().basic_consume(queue, no_ack, *arguments, **options)  # type: ignore[no-untyped-call]
        deliver = self.connection._callbacks[queue]

        def deliver_or_bury(message: Any) -> Any:
            try:
                return deliver(message)
            except (MemoryError, ResponseError, *self.connection_errors):
                raise
            except Exception as error:
                logger.exception("message not delivered queue=%s", queue)
                if not no_ack:
                    self.bury(queue, json.dumps(message).encode(), f"{type(error).__name__}: {error}")
                    self.basic_ack(message["properties"]["delivery_tag"])  # type: ignore[no-untyped-call]

        self.connection._callbacks[queue] = deliver_or_bury
        return consumed


class Transport(redis.Transport):
    """The Redis transport with the fixed channel."""

    Channel = Channel


def register() -> None:
    """Use this transport for every redis:// and rediss:// broker URL of this process, and its fixes for sentinel://."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
    TRANSPORT_ALIASES["sentinel"] = "trueup.worker.sentinel_transport:Transport"
    task_rejected.connect(_bury_rejected, weak=False, dispatch_uid=f"{__name__}.rejected")
    task_unknown.connect(_bury_unknown, weak=False, dispatch_uid=f"{__name__}.unknown")


def _bury_rejected(message: Any = None, exc: BaseException | None = None, **_: Any) -> None:
    _bury(message, f"Celery rejected it: {exc}" if exc else "Celery does not know its format")


def _bury_unknown(message: Any = None, name: str = "", **_: Any) -> None:
    _bury(message, f"this worker has no task {name}")


def _bury(message: Any, reason: str) -> None:
    """Keep a message that Celery has rejected, and so taken out of Redis."""
    if isinstance(message.channel, Channel):
        queue = message.delivery_info.get("routing_key") or ""
        message.channel.bury(queue, json.dumps(message._raw).encode(), reason)
