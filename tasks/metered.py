"""The metered base task: gate first, then the body with a model client bound to its hold, then the rest given back."""

import difflib
import functools
import logging
import os
import random
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

from celery import Task, shared_task
from celery.exceptions import Reject, Retry
from kombu.exceptions import OperationalError
from pydantic import BaseModel

from ai.metering import MeteredModel, running_task_id, spending_from
from ai.model import Model
from ai.providers import provider_from_settings
from billing import db
from billing.access import check_estimate
from billing.errors import ServiceUnavailableError, TokensDenied, TrueupError
from billing.holds import Hold, close_hold, open_hold
from billing.settings import get_settings
from billing.usage import SECTIONS
from tasks.arguments import USER_ARGUMENT, ArgumentParser

logger = logging.getLogger(__name__)

Estimator = Callable[[Mapping[str, Any]], int | None]
Estimate = int | Estimator
OnDenied = Literal["raise", "return"]

# How often this task has waited for the gate; kept apart from Celery's `retries`, which the body's own retries count.
WAITS_HEADER = "trueup_waits"

PROVIDER_RETRY_BASE_SECONDS = 2


class MeteredTask(Task):
    """Base of every task that may spend tokens.

    The gate sits in `__call__`, which all ways to call a task pass through: worker, eager, direct, map and chunks.
    `run` bypasses it, and finds a model client that refuses to spend.
    """

    abstract = True
    feature_name: ClassVar[str]
    section: ClassVar[str]
    estimated_tokens: ClassVar[Estimate]
    on_denied: ClassVar[OnDenied] = "raise"
    parser: ClassVar[ArgumentParser]

    throws = (TokensDenied,)
    dont_autoretry_for = (TokensDenied,)
    acks_late = True
    # A lost pool child is retried, at most max_retries times; a rejected message would come back for ever.
    retry_on_worker_lost = True
    # Celery's 180 s would keep a hold idle for as long.
    default_retry_delay = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        # A task called directly has no request of its own: none at all, or that of the metered task that calls it.
        if request.called_directly or running_task_id() == request.id:
            self.push_request(id=str(uuid.uuid4()), args=args, kwargs=kwargs, called_directly=True)
            try:
                return self._call(args, kwargs)
            finally:
                self.pop_request()
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            arguments = self.parser.parse(args, kwargs)
            tokens = self._estimate(arguments)
            if tokens is None:
                return _json_safe(self.run(**arguments))
            hold = self._open_hold(arguments, tokens)
            with _closing(hold), spending_from(hold):
                return _json_safe(self.run(**arguments))
        except TokensDenied as denied:
            if self.on_denied == "return":
                return denied.payload
            raise
        except ServiceUnavailableError as error:
            raise self._wait(error) from error
        except TrueupError as error:
            if getattr(error, "retryable", False) and not self.request.called_directly:
                raise self._retry_provider(error) from error
            raise

    def _estimate(self, arguments: dict[str, Any]) -> int | None:
        """Return the tokens to hold; None when this call uses no AI, so that it needs none and can spend none."""
        estimate = self.estimated_tokens
        # One base type for both would be a lie: the class attribute is a count, or a static function of one argument.
        return cast("Estimator", estimate)(arguments) if callable(estimate) else estimate

    def _open_hold(self, arguments: dict[str, Any], tokens: int) -> Hold:
        settings = get_settings()
        return db.retrying(
            lambda connection: open_hold(
                connection,
                user_id=arguments[USER_ARGUMENT],
                task_id=self.request.id,
                feature_name=self.feature_name,
                section=self.section,
                estimated_tokens=tokens,
                owner=f"{self.request.hostname or socket.gethostname()}:{os.getpid()}",
                lease_seconds=settings.hold_ttl_seconds,
            )
        )

    def _wait(self, error: ServiceUnavailableError) -> Exception:
        """Send the task back to wait for the database, and return what to raise.

        There is no last try: a task that could not be metered must neither run nor be lost.
        """
        request = self.request
        if request.called_directly or request.is_eager:
            return error
        headers = request.headers or {}
        waits = int(headers.get(WAITS_HEADER) or 0)
        longest = min(2**waits, get_settings().gate_retry_max_seconds)
        countdown = longest * random.uniform(0.5, 1)  # noqa: S311 - spreads load, guards nothing
        logger.warning("task waits %.1f s, for the %d. time: %s", countdown, waits + 1, error)
        signature = self.signature_from_request(
            request,
            countdown=countdown,
            retries=request.retries,
            headers={**headers, WAITS_HEADER: waits + 1},
        )
        try:
            signature.apply_async()
        except OperationalError:
            # The broker is away too. Rejected and put back now or, if that fails, when it is not acknowledged in time.
            rejected: Exception = Reject(error, requeue=True)
            return rejected
        retry: Exception = Retry(exc=error, when=countdown, sig=signature)
        return retry

    def _retry_provider(self, error: TrueupError) -> Exception:
        """Retry within the task's max_retries, then give up with the provider's own error."""
        countdown = PROVIDER_RETRY_BASE_SECONDS * 2**self.request.retries
        retry: Exception = self.retry(exc=error, countdown=countdown, throw=False)
        return retry


def metered_task(
    *,
    feature_name: str,
    section: str,
    estimated_tokens: Estimate,
    on_denied: OnDenied = "raise",
    **options: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a Celery task that passes the token gate before any work.

    The body's first parameter is given the model client, bound to the task's hold; the others are the caller's,
    `user_id` among them, and are parsed by their type hints. `estimated_tokens`: a count, or a function of the parsed
    arguments (by name) that returns one, or None for a call that uses no AI: it is not gated, and can't spend.
    `on_denied`: "raise" `TokensDenied`, or "return" its payload. `options`: Celery's own.

    Raises TypeError or ValueError at import for an unknown option, an unknown section, or a body without `user_id`.
    """
    _check_options(section, on_denied, options)
    if not callable(estimated_tokens):
        check_estimate(estimated_tokens)

    def decorate(body: Callable[..., Any]) -> Any:
        parser = ArgumentParser(body, given=1)

        @functools.wraps(body)
        def run(_task: MeteredTask, *args: Any, **kwargs: Any) -> Any:
            return body(_model(os.getpid()), *args, **kwargs)

        # Celery checks a call against this signature; the model client takes the place of the bound task.
        run.__signature__ = parser.signature_with_task()  # type: ignore[attr-defined]
        return shared_task(
            bind=True,
            base=MeteredTask,
            feature_name=feature_name,
            section=section,
            # A plain function would become a method of the task.
            estimated_tokens=staticmethod(estimated_tokens) if callable(estimated_tokens) else estimated_tokens,
            on_denied=on_denied,
            parser=parser,
            **options,
        )(run)

    return decorate


# Celery takes any misspelt option silently: these are the ones it knows.
CELERY_OPTIONS = frozenset(
    (
        "name",
        "queue",
        "routing_key",
        "exchange",
        "priority",
        "expires",
        "serializer",
        "compression",
        "acks_late",
        "acks_on_failure",
        "acks_on_failure_or_timeout",
        "acks_on_timeout",
        "reject_on_worker_lost",
        "retry_on_worker_lost",
        "autoretry_for",
        "dont_autoretry_for",
        "retry_backoff",
        "retry_backoff_max",
        "retry_jitter",
        "retry_kwargs",
        "max_retries",
        "default_retry_delay",
        "rate_limit",
        "time_limit",
        "soft_time_limit",
        "ignore_result",
        "store_errors_even_if_ignored",
        "track_started",
        "trail",
        "send_events",
        "resultrepr_maxsize",
        "throws",
        "typing",
        "backend",
    )
)


def _check_options(section: str, on_denied: str, options: dict[str, Any]) -> None:
    for option in options:
        if option not in CELERY_OPTIONS:
            near = difflib.get_close_matches(option, [*CELERY_OPTIONS, "feature_name", "section", "on_denied"], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(f"metered_task has no option {option!r}.{hint}")
    if section not in SECTIONS:
        raise ValueError(f"section: {section!r} is none of the log's sections: {', '.join(sorted(SECTIONS))}")
    if on_denied not in ("raise", "return"):
        raise ValueError(f'on_denied: {on_denied!r} is neither "raise" nor "return"')


@lru_cache(maxsize=1)
def _model(pid: int) -> Model:
    """Return this process's model client; a forked child makes its own, for connections can't be shared."""
    settings = get_settings()
    return MeteredModel(provider_from_settings(settings), settings)


def _json_safe(result: Any) -> Any:
    return result.model_dump(mode="json") if isinstance(result, BaseModel) else result


@contextmanager
def _closing(hold: Hold) -> Iterator[None]:
    """Give back what the body leaves, also on Retry, SystemExit and a soft time limit.

    If that fails, the lease runs out and it is given back then: the work itself is done.
    """
    try:
        yield
    finally:
        try:
            db.retrying(lambda connection: close_hold(connection, hold))
        except TrueupError:
            logger.warning(
                "hold of task %s (user %s) not closed: it expires at %s", hold.task_id, hold.user_id, hold.expires_at
            )
