"""Publish a running task's message again, so that the broker has it before the worker acknowledges the first one.

RabbitMQ answers no publisher unless asked to: a message that it refuses, or that is lost with the connection, looks
sent. The worker would then acknowledge the first message, and the task would be lost. A retry or requeue of a metered
task therefore waits for RabbitMQ's confirmation. Redis answers each command.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

# How often this task has waited for the gate. Celery's `retries` can't hold it: it counts the body's own retries.
WAITS_HEADER = "trueup_waits"

# What RabbitMQ notes on a message that moves between queues, as each delayed message of a quorum queue does. Before
# 4.0.1 it drops a new message with these notes on its way to a queue that they name.
DEATH_HEADERS = ("x-death", "x-first-death-", "x-last-death-")

# A RabbitMQ short of memory or disk reads nothing from its publishers.
CONFIRM_SECONDS = 10


def is_republished(options: Mapping[str, Any]) -> bool:
    """Return whether these options of `apply_async` are those of a retry or a requeue."""
    return bool(options.get("retries")) or WAITS_HEADER in (options.get("headers") or {})


@contextmanager
def confirmed(app: Celery, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give these options of `apply_async` as those with which it returns only when the broker has the message.

    The message's notes of its way through RabbitMQ's queues are left out. Celery before 5.7 sends them again.
    """
    with app.connection_for_write(transport_options={"confirm_publish": True}) as connection:
        if connection.transport.driver_type != "amqp":
            yield dict(options)
            return
        publishing = {"connection": connection, "confirm_timeout": CONFIRM_SECONDS}
        # Celery delays the messages of quorum queues by whole seconds, and refuses a countdown below one.
        if 0 < (options.get("countdown") or 0) < 1:
            publishing["countdown"] = 1
        headers = options.get("headers") or {}
        kept = {name: value for name, value in headers.items() if not name.startswith(DEATH_HEADERS)}
        yield {**options, **publishing, "headers": kept}


def broker_errors(app: Celery) -> tuple[type[Exception], ...]:
    """Return the errors with which the broker refuses a message, or with which its connection is lost.

    kombu translates only the errors after which a second try may work. A refusal, such as `ACCESS_REFUSED` of RabbitMQ
    or `OOM` of Redis, comes as the driver's own error.
    """
    connection = app.connection_for_write()
    return (OperationalError, *connection.connection_errors, *connection.channel_errors)
