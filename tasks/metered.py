"""`metered_task`: the decorator that makes a metered Celery task from a function."""

import difflib
import functools
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from celery import Celery, shared_task
from celery.local import Proxy

from trueup.accounts.validation import check_estimate
from trueup.host.fields import check_section
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Provider
from trueup.llm.providers import provider_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.applications import find_application
from trueup.tasks.arguments import ArgumentParser
from trueup.tasks.base import Estimate, MeteredTask, OnDenied, Replay
from trueup.tasks.body import call_body, check_body, takes_model


def metered_task(
    *,
    feature_name: str,
    estimated_tokens: Estimate,
    section: str = "other",
    on_denied: OnDenied = "raise",
    replay: Replay = "redelivery",
    **options: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a Celery task that passes the token gate before any work.

    The body is a function or a coroutine function. If its first parameter is called `model`, or has the type `Model` or
    `AsyncModel`, it receives the model client, bound to the task's hold. A body that calls the makers' SDKs over
    `http_client()` needs no such parameter. The caller passes the others, `user_id` among them; they are parsed by
    their type hints.

    `feature_name`: as logs, denials and the usage log name the task. `section`: a section
    that the host's usage log takes.
    `estimated_tokens`: the tokens to hold, or a function of the parsed arguments (by name) that returns them. It may
    return None for a call that uses no AI: such a call is not gated and can't spend.
    `on_denied`: "raise" `TokensDenied`, or "return" its payload. `replay`: when the body gets the answers again that it
    has paid for: on a "redelivery" and after the loss of a worker, or "always", also when it asks for a retry itself.
    `options`: Celery's own task options.

    Raises TypeError or ValueError at import for an unknown option or section, for a body without `user_id`, and for a
    generator function, a class, or a type hint that can't be resolved.
    """
    _check_options(section, on_denied, replay, options)
    if not callable(estimated_tokens):
        check_estimate(estimated_tokens)

    def decorate(body: Callable[..., Any]) -> Any:
        check_body(body, named="name" in options)
        asks_for_model = takes_model(body)
        parser = ArgumentParser(body, given=1 if asks_for_model else 0)

        @functools.wraps(body)
        def run(_task: MeteredTask, *args: Any, **kwargs: Any) -> Any:
            given = (_model(os.getpid()),) if asks_for_model else ()
            return call_body(body, _task, *given, *args, **kwargs)

        # Celery checks calls against this signature. It has the bound task in place of the model client.
        run.__signature__ = parser.signature_with_task()  # type: ignore[attr-defined]
        # This registers it with every application. Celery's own proxy finds the task by the current one alone.
        shared_task(
            bind=True,
            base=MeteredTask,
            feature_name=feature_name,
            section=section,
            # As a class attribute, a plain function would become a method of the task.
            estimated_tokens=staticmethod(estimated_tokens) if callable(estimated_tokens) else estimated_tokens,
            on_denied=on_denied,
            replay=replay,
            parser=parser,
            provider=staticmethod(_provider) if asks_for_model else None,
            **options,
        )(run)
        return Proxy(lambda: _task_of(find_application(), options.get("name"), run))

    return decorate


def _task_of(app: Celery, name: str | None, run: Callable[..., Any]) -> Any:
    return app.tasks[name or app.gen_task_name(run.__name__, run.__module__)]


# Celery accepts a misspelt option silently, so options are checked against the ones it knows.
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


def _check_options(section: str, on_denied: str, replay: str, options: dict[str, Any]) -> None:
    for option in options:
        if option not in CELERY_OPTIONS:
            near = difflib.get_close_matches(
                option, [*CELERY_OPTIONS, "feature_name", "section", "on_denied", "replay"], n=1
            )
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(f"metered_task has no option {option!r}.{hint}")
    check_section(section)
    if on_denied not in ("raise", "return"):
        raise ValueError(f'on_denied: {on_denied!r} is not valid: use "raise" or "return"')
    if replay not in ("redelivery", "always"):
        raise ValueError(f'replay: {replay!r} is not valid: use "redelivery" or "always"')


@lru_cache(maxsize=1)
def _model(pid: int) -> MeteredModel:
    """Return the model client of process `pid`: a forked child must not share its parent's connections."""
    return MeteredModel(partial(provider_from_settings, get_settings()))


def _provider() -> Provider:
    """Return this process's provider. Raises `SettingsError` if the settings name no provider or lack its key."""
    return _model(os.getpid()).provider
