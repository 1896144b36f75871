"""Combinations of settings that are dangerous although each setting is valid."""

from collections.abc import Iterator
from functools import partial

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.settings.model_keys import model_key
from trueup.settings.settings import PREFIX, Settings

_warning, _error = partial(warning, "settings"), partial(error, "settings")


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Yield each dangerous combination of settings."""
    found = [*_times(settings), *_servers(settings), *_model(settings)]
    yield from found or [ok("settings", "The settings are valid, and no combination is dangerous.")]


def _times(settings: Settings) -> Iterator[Finding]:
    if settings.visibility_timeout_seconds <= settings.task_time_limit_seconds:
        yield _warning(
            f"Redis redelivers a task after {settings.visibility_timeout_seconds} s, but it may run for "
            f"{settings.task_time_limit_seconds} s: long tasks are delivered twice.",
            f"Set {PREFIX}VISIBILITY_TIMEOUT_SECONDS above {PREFIX}TASK_TIME_LIMIT_SECONDS.",
        )
    if settings.hold_ttl_seconds < settings.lease_seconds:
        yield _warning(
            f"A hold expires after {settings.hold_ttl_seconds} s, but a model call may take "
            f"{settings.lease_seconds:.0f} s: holds expire during calls.",
            f"Raise {PREFIX}HOLD_TTL_SECONDS, or lower {PREFIX}MODEL_TIMEOUT_SECONDS.",
        )
    if settings.task_time_limit_seconds <= settings.lease_seconds - settings.model_timeout_seconds:
        yield _warning(
            f"Celery ends a task after {settings.task_time_limit_seconds} s, before a model call times out "
            f"({settings.model_timeout_seconds:.0f} s, {settings.model_max_retries} retries).",
            f"Raise {PREFIX}TASK_TIME_LIMIT_SECONDS, or lower {PREFIX}MODEL_TIMEOUT_SECONDS.",
        )
    if not settings.reconcile_deep_interval_seconds:
        what = "No deep pass compares balances with the log: a row that no trigger saw is never counted."
        yield _warning(what, f"Set {PREFIX}RECONCILE_DEEP_INTERVAL_SECONDS, for example to 86400.")


def _servers(settings: Settings) -> Iterator[Finding]:
    if bool(settings.database_url) != bool(settings.broker_url):
        unset = "BROKER_URL" if settings.database_url else "DATABASE_URL"
        what = f"{PREFIX}{unset} is not set, but the other URL is: each machine would use its own embedded server."
        yield _warning(what, f"Set {PREFIX}{unset} too.")


def _model(settings: Settings) -> Iterator[Finding]:
    names, key = model_key(settings)
    if names and key is None:
        yield _error(f"The model provider is {settings.model_provider}, but no API key is set.", f"Set {names}.")
    if settings.model_provider is None and settings.database_url:
        yield _warning(
            "No model provider is set: metered tasks fail before the gate and hold no tokens.",
            f"Set {PREFIX}MODEL_PROVIDER=openai. Ignore this if no metered task runs: reconciling needs no provider.",
        )
    if settings.model_provider == "offline" and settings.database_url:
        what = "The model provider is offline: made-up answers are charged to real users."
        yield _warning(what, f"Set {PREFIX}MODEL_PROVIDER=openai, or unset it if no metered task runs.")
