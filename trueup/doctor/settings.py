"""Settings that are each allowed, and dangerous together."""

from collections.abc import Iterator

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.settings.settings import PREFIX, Settings

CHECK = "settings"


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Yield what is dangerous; one "ok" when nothing is."""
    found = [*_times(settings), *_servers(settings), *_model(settings)]
    yield from found or [ok(CHECK, "Read, and none endangers another.")]


def _times(settings: Settings) -> Iterator[Finding]:
    if settings.visibility_timeout_seconds <= settings.task_time_limit_seconds:
        yield warning(
            CHECK,
            f"Redis delivers a task again after {settings.visibility_timeout_seconds} s, while it may run for "
            f"{settings.task_time_limit_seconds} s: long tasks are delivered twice.",
            f"Set {PREFIX}VISIBILITY_TIMEOUT_SECONDS above {PREFIX}TASK_TIME_LIMIT_SECONDS.",
        )
    if settings.hold_ttl_seconds < settings.lease_seconds:
        yield warning(
            CHECK,
            f"A hold lives for {settings.hold_ttl_seconds} s, and one call of the model may take "
            f"{settings.lease_seconds:.0f} s: holds end under calls in flight.",
            f"Raise {PREFIX}HOLD_TTL_SECONDS, or lower {PREFIX}MODEL_TIMEOUT_SECONDS.",
        )
    if settings.task_time_limit_seconds <= settings.lease_seconds - settings.model_timeout_seconds:
        yield warning(
            CHECK,
            f"A task is ended after {settings.task_time_limit_seconds} s, before one call of the model has timed out "
            f"({settings.model_timeout_seconds:.0f} s, {settings.model_max_retries} repeats).",
            f"Raise {PREFIX}TASK_TIME_LIMIT_SECONDS, or lower {PREFIX}MODEL_TIMEOUT_SECONDS.",
        )
    if not settings.reconcile_deep_interval_seconds:
        yield warning(
            CHECK,
            "Balances are never compared with the log: a row that passed by the triggers stays uncounted.",
            f"Set {PREFIX}RECONCILE_DEEP_INTERVAL_SECONDS, say to 86400.",
        )


def _servers(settings: Settings) -> Iterator[Finding]:
    if bool(settings.database_url) != bool(settings.broker_url):
        unset = "BROKER_URL" if settings.database_url else "DATABASE_URL"
        yield warning(
            CHECK,
            f"{PREFIX}{unset} is not set and the other server's is: each machine would use one of its own.",
            f"Set {PREFIX}{unset} too.",
        )


def _model(settings: Settings) -> Iterator[Finding]:
    if settings.model_provider == "openai" and settings.openai_api_key is None:
        yield error(CHECK, "The model provider is openai, and there is no key for it.", f"Set {PREFIX}OPENAI_API_KEY.")
    if settings.model_provider is None and settings.database_url:
        yield warning(
            CHECK,
            "No model provider is set: metered tasks fail before the gate, and hold no tokens.",
            f"Set {PREFIX}MODEL_PROVIDER=openai. Leave it if no metered task runs: reconciling needs no provider.",
        )
    if settings.model_provider == "offline" and settings.database_url:
        yield warning(
            CHECK,
            "The model provider is offline: answers are made up here, and charged to real users.",
            f"Set {PREFIX}MODEL_PROVIDER=openai, or unset it if no metered task runs.",
        )
