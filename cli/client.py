"""The Celery application of commands. It reports a broken connection at once, where a worker would retry."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from trueup.cli.output import without_password
from trueup.errors import ServiceUnavailableError, SettingsError
from trueup.settings.settings import Settings, broker_url, result_backend_url
from trueup.worker.application import make_application
from trueup.worker.config import ANSWER_SECONDS, client_config


@contextmanager
def celery_client(settings: Settings) -> Iterator[Celery]:
    """Yield an application that sends trueup's tasks and reads their results.

    Raises `ServiceUnavailableError` within seconds when Redis does not answer, here or in the block, and
    `SettingsError` for a URL that Celery can't parse.
    """
    app = make_application("trueup-client")
    # No pool: kombu's pool and its connections would outlive this application.
    app.conf.update(client_config(settings) | {"broker_pool_limit": None})
    with ExitStack() as stack:
        stack.callback(app.close)
        with _redis_errors(broker_url(settings)), _readable(broker_url(settings)):
            connection = stack.enter_context(app.connection_for_write())
            connection.ensure_connection(max_retries=0, timeout=ANSWER_SECONDS)
        with _redis_errors(result_backend_url(settings)), _readable(result_backend_url(settings)):
            backend = app.backend
            # The pool belongs to Celery: closing the client would leave its connections open.
            stack.callback(backend.client.connection_pool.disconnect)
            stack.callback(_forget_results, backend.result_consumer)
            stack.callback(backend.result_consumer.stop)
            backend.client.set_retry(Retry(NoBackoff(), 0))
            backend.client.ping()
        with _redis_errors(broker_url(settings)):
            yield app


def _forget_results(consumer: Any) -> None:
    """Prevent that a result unsubscribes in Redis when it is garbage-collected: that would open a connection, or fail.

    Celery before 5.7 also unsubscribes results that it never subscribed, as long as it has a channel.
    """
    consumer.subscribed_to.clear()
    consumer._pubsub = None


@contextmanager
def _redis_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (OperationalError, RedisError) as error:
        raise ServiceUnavailableError("Redis", without_password(url), str(error).rstrip(".")) from error


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        # The cause may quote a part of a password that was split wrongly.
        cause = "" if "@" in str(error) else f" ({str(error).rstrip('.')})"
        raise SettingsError(
            f"The Redis URL {without_password(url)} can't be read{cause}. Correct it, and "
            "percent-encode special characters in the password."
        ) from None
