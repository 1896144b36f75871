"""Settings: environment variables `TRUEUP_*`, then `trueup.toml`, then defaults that need no server.

Nothing is read at import. `get_settings()` reads once per process; `get_settings.cache_clear()` forgets.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as SourceError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from trueup.errors import SettingsError
from trueup.host.mapping import HostMapping
from trueup.settings.alerts import AlertSettings
from trueup.settings.api import ApiSettings
from trueup.settings.gate import GateSettings
from trueup.settings.reconcile import ReconcileSettings

PREFIX = "TRUEUP_"
CONFIG_VARIABLE = "TRUEUP_CONFIG"

LEASE_MARGIN_SECONDS = 30

ModelProvider = Literal["offline", "openai"]


class Settings(BaseSettings):
    """All settings. Times are seconds, sizes are counts; each is `TRUEUP_` plus its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        # Pydantic before 2.10 warns of each field whose name begins with "model_", unless this is empty.
        protected_namespaces=(),
    )

    home: Path = Field(default=Path(".trueup"), description="data folder of the embedded PostgreSQL and Redis")
    database_url: str | None = Field(default=None, description="PostgreSQL URL; unset means the embedded server")
    broker_url: str | None = Field(default=None, description="Redis URL for Celery; unset means the embedded server")
    result_backend_url: str | None = Field(default=None, description="Redis URL for results; unset means the broker's")
    # One for the work, and one for the sign of life beside it.
    database_pool_size: int = Field(default=5, ge=2, le=100, description="connections per process")
    database_connect_timeout_seconds: int = Field(default=5, ge=1, le=60)
    statement_timeout_seconds: int = Field(default=30, ge=1, le=3600)

    hold_ttl_seconds: int = Field(
        default=1200, ge=30, description="a hold whose owner died is given back after this long"
    )
    store_answers: bool = Field(
        default=True,
        description="keep providers' answers, so that a redelivered task need not buy them again",
    )
    stored_answer_max_bytes: int = Field(default=65_536, ge=0, le=10_000_000)
    answer_retention_days: int = Field(default=7, ge=0, description="stored answers are forgotten after this long")
    keep_hold_seconds: int = Field(
        default=60, ge=0, le=600, description="a task that retries within this long keeps its hold"
    )
    resend_unknown_messages: bool = Field(
        default=False, description="send a message again whose first sending may or may not have happened"
    )
    gate_retry_max_seconds: int = Field(
        default=60, ge=1, le=600, description="longest wait between tries while the gate is down"
    )
    reconcile_interval_seconds: int = Field(default=900, ge=10)
    reconcile_deep_interval_seconds: int = Field(
        default=86_400, ge=0, description="how often the balances are compared with the log; 0 means never"
    )
    reconcile_deep_offset_seconds: int = Field(
        default=7200, ge=0, description="when in that interval, counted from midnight UTC"
    )
    reconcile_shard_size: int = Field(default=250_000, ge=1000, description="subscriptions that a worker takes at once")
    reconcile_scan_timeout_seconds: int = Field(
        default=600, ge=1, le=86_400, description="limit of a statement that reads a whole shard"
    )
    beat_scheduler: Literal["file", "redbeat"] = Field(
        default="file", description="redbeat: any number of beats, of which one sends (pip install celery-redbeat)"
    )
    beat_lock_seconds: int = Field(
        default=60, ge=5, le=3600, description="with redbeat: another beat takes over after this long"
    )
    expire_interval_seconds: int = Field(default=60, ge=1)
    reconcile_batch_size: int = Field(default=1000, ge=1, le=10_000)

    worker_concurrency: int = Field(default=2, ge=1, le=512)
    visibility_timeout_seconds: int = Field(
        default=1200, ge=5, description="Redis redelivers a task not acknowledged for this long"
    )
    task_time_limit_seconds: int = Field(default=600, ge=2, validate_default=True)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    # No default: answers that are made up must not reach real users because a setting was forgotten.
    model_provider: ModelProvider | None = Field(
        default=None, description="openai, or offline for made-up answers; unset means that AI tasks fail"
    )
    model_name: str = "gpt-4o-mini"
    openai_base_url: str | None = Field(
        default=None, description="any OpenAI-compatible endpoint; unset means OpenAI's own"
    )
    openai_api_key: SecretStr | None = None
    model_timeout_seconds: float = Field(
        default=60.0, gt=0, le=600, description="for one whole answer; of a stream, for each event"
    )
    model_max_retries: int = Field(
        default=0, ge=0, le=10, description="repeats by the SDK of requests that were not served"
    )
    model_max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    instagram_graph_url: str = "https://graph.instagram.com/v23.0"
    instagram_access_token: SecretStr | None = None
    instagram_timeout_seconds: float = Field(default=10.0, gt=0, le=120)

    reconcile: ReconcileSettings = ReconcileSettings()
    alerts: AlertSettings = AlertSettings()
    gate: GateSettings = GateSettings()
    api: ApiSettings = ApiSettings()
    host: HostMapping = HostMapping()

    @field_validator("model_provider", mode="before")
    @classmethod
    def _empty_is_unset(cls, provider: object) -> object:
        return provider or None

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("task_time_limit_seconds")
    @classmethod
    def _ended_before_its_hold(cls, seconds: int, info: ValidationInfo) -> int:
        ttl = info.data.get("hold_ttl_seconds")
        if ttl is not None and seconds >= ttl:
            raise ValueError(
                f"give less than hold_ttl_seconds ({ttl}): a task that outlives its hold may spend others' tokens"
            )
        return seconds

    @field_validator("database_url")
    @classmethod
    def _psycopg_url(cls, url: str | None) -> str | None:
        """Accept the usual PostgreSQL schemes, and name the driver that trueup uses."""
        if not url:
            return None
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in ("postgresql", "postgres", "postgresql+psycopg"):
            raise ValueError("give a PostgreSQL URL: postgresql://user:password@host:5432/name")
        try:
            make_url(f"postgresql+psycopg://{rest}")
        except (ArgumentError, ValueError):
            raise ValueError("this URL can't be read: check its port, and escape special characters") from None
        return f"postgresql+psycopg://{rest}"

    @field_validator("broker_url", "result_backend_url")
    @classmethod
    def _redis_url(cls, url: str | None) -> str | None:
        if not url:
            return None
        if url.partition("://")[0] not in ("redis", "rediss", "redis+socket", "sentinel"):
            raise ValueError("give a Redis URL: redis://:password@host:6379/0")
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, toml_file=_config_file())
        return init_settings, env_settings, toml

    @property
    def lease_seconds(self) -> float:
        """How long a hold is one attempt's alone without a sign of life: longer than any call of the model takes."""
        return self.model_timeout_seconds * (self.model_max_retries + 1) + LEASE_MARGIN_SECONDS

    @property
    def stack_file(self) -> Path:
        """The embedded stack writes its URLs here while it runs."""
        return self.home / "run" / "stack.json"


def _config_file() -> Path:
    return Path(os.environ.get(CONFIG_VARIABLE) or "trueup.toml")


def _refuse_missing_file() -> None:
    """A file that was asked for and is not there would mean the defaults, and so another database: refuse."""
    if os.environ.get(CONFIG_VARIABLE) and not _config_file().is_file():
        raise SettingsError(f"{CONFIG_VARIABLE}: there is no file {_config_file()}. Correct the path, or unset it.")


def _refuse_unknown_variables() -> None:
    """A misspelt variable would be ignored silently: refuse it, and name the nearest real one."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    for variable in os.environ:
        if not variable.startswith(PREFIX) or variable.split("__")[0] in known:
            continue
        near = [
            PREFIX + name for name in _nearest(variable.removeprefix(PREFIX), {k.removeprefix(PREFIX) for k in known})
        ]
        hint = f"Did you mean {near[0]}?" if near else "`trueup settings` lists them."
        raise SettingsError(f"{variable} is no setting of trueup. {hint}")


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, sorted(known), n=1)


def _setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every setting's name, the nested ones' in full: host.subscription.table."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _setting_names(field.annotation, f"{prefix}{name}.")


def _describe(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = _nearest(name, _setting_names(Settings))
            hint = f" Did you mean {near[0]}?" if near else ""
            lines.append(f"{name}: no such setting.{hint}")
        else:
            lines.append(f"{name} ({PREFIX}{name.replace('.', '__').upper()}): {fault['msg']}")
    return "Wrong settings. " + "; ".join(lines)


def read_settings() -> Settings:
    """Read the settings afresh. Raises `SettingsError` on an unknown or malformed one."""
    _refuse_unknown_variables()
    _refuse_missing_file()
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(_describe(error)) from None
    except SourceError as error:
        raise SettingsError(f"Wrong settings. {error}: give JSON, or set its parts one by one.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{_config_file()} cannot be read: {error}") from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return this process's settings, read at the first call."""
    return read_settings()


def _running_stack(settings: Settings) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(settings.stack_file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content


def database_url(settings: Settings) -> str:
    """Return the URL of PostgreSQL: the one set, else that of the embedded server now running.

    Raises `SettingsError` when neither is there.
    """
    return _url_of(settings, "database_url", "database")


def broker_url(settings: Settings) -> str:
    """Return the URL of Redis: the one set, else that of the embedded server now running.

    Raises `SettingsError` when neither is there.
    """
    return _url_of(settings, "broker_url", "broker")


def _url_of(settings: Settings, name: str, what: str) -> str:
    url = getattr(settings, name) or _running_stack(settings).get(name)
    if not url:
        raise SettingsError(
            f"No {what}: {PREFIX}{name.upper()} is not set and no embedded stack runs in {settings.home}. "
            "Set it, or start the stack with `trueup up`."
        )
    return str(url)


def result_backend_url(settings: Settings) -> str:
    """Return the URL where Celery keeps results: the one set, else the broker's."""
    return settings.result_backend_url or broker_url(settings)
