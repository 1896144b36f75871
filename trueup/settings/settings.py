"""Settings: environment variables `TRUEUP_*`, `trueup.toml`, a Django project's settings, defaults that need no server.

Nothing is read at import. `get_settings()` reads once per process, `get_settings.cache_clear()` discards what it read.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as SourceError

from trueup.errors import SettingsError
from trueup.host.mapping import HostMapping
from trueup.settings.alerts import AlertSettings
from trueup.settings.api import ApiSettings
from trueup.settings.broker import check_redis_url
from trueup.settings.gate import GateSettings
from trueup.settings.home import default_home
from trueup.settings.models import ModelSettings, TokenClass, Weight
from trueup.settings.policies import ReconcileSettings
from trueup.settings.urls import ESCAPE, is_readable, split_http_url

PREFIX = "TRUEUP_"
CONFIG_VARIABLE = "TRUEUP_CONFIG"
LEASE_MARGIN_SECONDS = 30

ModelProvider = Literal["anthropic", "gemini", "offline", "openai"]


class Settings(BaseSettings):
    """All settings. Times are seconds, sizes are counts. A variable is `TRUEUP_` plus the name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        # Pydantic before 2.10 warns about each field whose name begins with "model_", unless this is empty.
        protected_namespaces=(),
    )

    name: str = Field(
        default="", max_length=100, description="the host's name in the titles of pages; unset: the database's name"
    )
    home: Path = Field(
        default_factory=default_home,
        description="data folder of the embedded PostgreSQL and Redis; unset means the project's .trueup, else the "
        "user's data folder",
    )
    database_url: str | None = Field(default=None, description="PostgreSQL URL; unset means the embedded server")
    broker_url: str | None = Field(default=None, description="Redis URL for Celery; unset means the embedded server")
    result_backend_url: str | None = Field(default=None, description="Redis URL for results; unset means the broker's")
    sentinel_master: str | None = Field(default=None, description="name of the master, for sentinel:// URLs")
    # One connection for the work and one for the heartbeat.
    database_pool_size: int = Field(default=5, ge=2, le=100, description="connections per process")
    database_connect_timeout_seconds: int = Field(default=5, ge=1, le=60)
    statement_timeout_seconds: int = Field(default=30, ge=1, le=3600)

    hold_ttl_seconds: int = Field(default=1200, ge=30, description="a hold without a heartbeat expires after this")
    hold_max_seconds: int = Field(
        default=21_600, ge=30, validate_default=True, description="a heartbeat keeps a hold for at most this"
    )
    store_answers: bool = Field(default=True, description="keep providers' answers for replay after redelivery")
    stored_answer_max_bytes: int = Field(default=65_536, ge=0, le=10_000_000)
    answer_retention_days: int = Field(default=7, ge=0, description="stored answers are deleted after this")
    journal_retention_days: int = Field(
        default=30, ge=1, description="settled changes of counters are deleted after this"
    )
    on_charge: str | None = Field(
        default=None, description="dotted path of a function that is called after each charge: shop.figures.on_charge"
    )
    keep_hold_seconds: int = Field(default=60, ge=0, le=600, description="a retry within this keeps its hold")
    resend_unknown_messages: bool = Field(default=False, description="resend a message that may have been sent already")
    gate_retry_max_seconds: int = Field(default=60, ge=1, le=600, description="maximum delay while the gate is down")
    reconcile_interval_seconds: int = Field(default=900, ge=10)
    reconcile_deep_interval_seconds: int = Field(default=86_400, ge=0, description="time between deep passes; 0: none")
    reconcile_deep_offset_seconds: int = Field(default=7200, ge=0, description="start of deep passes from midnight UTC")
    reconcile_shard_size: int = Field(default=250_000, ge=1000, description="subscriptions in a shard")
    reconcile_scan_timeout_seconds: int = Field(default=600, ge=1, le=86_400, description="a shard's statement timeout")
    beat_scheduler: Literal["file", "redbeat"] = Field(default="file", description="redbeat: several beats, one sends")
    beat_lock_seconds: int = Field(default=60, ge=5, le=3600, description="redbeat: another beat takes over after this")
    expire_interval_seconds: int = Field(default=60, ge=1)
    reconcile_batch_size: int = Field(default=1000, ge=1, le=10_000)

    worker_concurrency: int = Field(default=2, ge=1, le=512)
    visibility_timeout_seconds: int = Field(default=1200, ge=5, description="an unacknowledged task is redelivered")
    task_time_limit_seconds: int = Field(default=600, ge=2, validate_default=True)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    # No default: a forgotten setting must not send made-up answers to real users.
    model_provider: ModelProvider | None = Field(
        default=None, description="openai, anthropic, gemini, or offline for made-up answers; unset: AI tasks fail"
    )
    model_name: str = "gpt-4o-mini"
    openai_base_url: str | None = Field(default=None, description="an OpenAI-compatible endpoint; unset: OpenAI's own")
    openai_api_key: SecretStr | None = Field(default=None, description="unset: OPENAI_API_KEY, for OpenAI's own server")
    model_base_url: str | None = Field(
        default=None, description="another server with the API of Anthropic or Gemini; unset: the maker's own"
    )
    model_api_key: SecretStr | None = Field(
        default=None, description="for anthropic and gemini; unset: ANTHROPIC_API_KEY, GEMINI_API_KEY, GOOGLE_API_KEY"
    )
    model_timeout_seconds: float = Field(
        default=60.0, gt=0, le=600, description="for one whole answer; of a stream, for each event"
    )
    model_max_retries: int = Field(default=0, ge=0, le=10, description="the SDK's retries of requests not served")
    model_max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    count: dict[TokenClass, Weight] = Field(
        default_factory=dict, description="how much a token of a class counts, such as cached_input = 0.1; else 1"
    )
    models: dict[str, ModelSettings] = Field(default_factory=dict, description='by pattern of the name: "gpt-5*"')

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

    @field_validator("on_charge")
    @classmethod
    def _dotted_path(cls, path: str | None) -> str | None:
        if not path:
            return None
        parts = path.split(".")
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            raise ValueError("give the dotted path of a function, with its module: shop.figures.on_charge")
        return path

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("hold_max_seconds")
    @classmethod
    def _no_less_than_without_heartbeat(cls, seconds: int, info: ValidationInfo) -> int:
        ttl = info.data.get("hold_ttl_seconds")
        if ttl is not None and seconds < ttl:
            raise ValueError(f"give at least hold_ttl_seconds ({ttl}): a hold lives that long without a heartbeat")
        return seconds

    @field_validator("task_time_limit_seconds")
    @classmethod
    def _shorter_than_the_hold(cls, seconds: int, info: ValidationInfo) -> int:
        ttl = info.data.get("hold_ttl_seconds")
        if ttl is not None and seconds >= ttl:
            raise ValueError(f"give less than hold_ttl_seconds ({ttl}): a task must not run longer than its hold lives")
        return seconds

    @field_validator("database_url")
    @classmethod
    def _psycopg_url(cls, url: str | None) -> str | None:
        """Accept the usual PostgreSQL schemes, and select the driver psycopg."""
        if not url:
            return None
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in ("postgresql", "postgres", "postgresql+psycopg"):
            raise ValueError("give a PostgreSQL URL: postgresql://user:password@host:5432/name")
        try:
            parsed = make_url(f"postgresql+psycopg://{rest}")
        except (ArgumentError, ValueError):
            raise ValueError(f"malformed URL: check its port, or {ESCAPE}") from None
        if "@" in (parsed.host or ""):
            raise ValueError(f"malformed URL: {ESCAPE}")
        return f"postgresql+psycopg://{rest}"

    @field_validator("broker_url", "result_backend_url")
    @classmethod
    def _redis_url(cls, url: str | None) -> str | None:
        if not url:
            return None
        check_redis_url(url)
        if not is_readable(url):
            raise ValueError(f"this URL can't be read: check its port, or {ESCAPE}")
        return url

    @field_validator("openai_base_url", "model_base_url", "instagram_graph_url")
    @classmethod
    def _http_url(cls, url: str | None) -> str | None:
        if url and split_http_url(url) is None:
            raise ValueError(f"give an HTTP URL: https://host.example/v1. Check its port, or {ESCAPE}")
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
        project = InitSettingsSource(settings_cls, init_kwargs=_project_settings())
        return init_settings, env_settings, toml, project

    @property
    def lease_seconds(self) -> float:
        """How long a hold belongs to one attempt without a heartbeat. It is longer than any model call."""
        return self.model_timeout_seconds * (self.model_max_retries + 1) + LEASE_MARGIN_SECONDS

    @property
    def stack_file(self) -> Path:
        """The file with the URLs of the embedded stack, while it runs."""
        return self.home / "run" / "stack.json"


def _no_project() -> dict[str, Any]:
    return {}


_project_settings: Callable[[], dict[str, Any]] = _no_project


def use_project_settings(read: Callable[[], dict[str, Any]]) -> None:
    """Take settings that neither a variable nor trueup.toml gives from `read`, which is called when they are needed."""
    global _project_settings
    _project_settings = read
    get_settings.cache_clear()


def _config_file() -> Path:
    return Path(os.environ.get(CONFIG_VARIABLE) or "trueup.toml")


def _refuse_missing_file() -> None:
    """Refuse a named file that does not exist. With the defaults, trueup would use another database."""
    if os.environ.get(CONFIG_VARIABLE) and not _config_file().is_file():
        raise SettingsError(f"{CONFIG_VARIABLE}: there is no file {_config_file()}. Correct the path, or unset it.")


def _refuse_unknown_variables() -> None:
    """Refuse a misspelt variable, and name the nearest setting. Otherwise it would be ignored silently."""
    known = {name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE.removeprefix(PREFIX)}
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if name != variable and name.split("__")[0] not in known:
            near = _nearest(name, known)
            hint = f"Did you mean {PREFIX}{near[0]}?" if near else "`trueup settings` lists the settings."
            raise SettingsError(f"{variable} is no setting of trueup. {hint}")


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, sorted(known), n=1)


def _setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the name of every setting; a nested one in full: host.subscription.table."""
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
    return "Wrong settings, nothing was started. " + "; ".join(lines)


def read_settings() -> Settings:
    """Read the settings again. Raises `SettingsError` for an unknown or malformed setting."""
    _refuse_unknown_variables()
    _refuse_missing_file()
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(_describe(error)) from None
    except SourceError as error:
        raise SettingsError(
            f"Wrong settings, nothing was started. {error}: give JSON, or set each field by its own variable."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(
            f"{_config_file()} cannot be read: {error}. Nothing was started. Correct the file."
        ) from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return this process's settings, read at the first call."""
    return read_settings()


def database_url(settings: Settings) -> str:
    """Return the URL of PostgreSQL: the setting, else the running embedded server's. Raises `SettingsError` if none."""
    return settings.database_url or _embedded_url(settings, "database_url")


def broker_url(settings: Settings) -> str:
    """Return the URL of Redis: the setting, else the running embedded server's. Raises `SettingsError` if none."""
    return settings.broker_url or _embedded_url(settings, "broker_url")


def result_backend_url(settings: Settings) -> str:
    """Return the URL where Celery keeps results: the setting, else the broker's."""
    return settings.result_backend_url or broker_url(settings)


def host_name(settings: Settings) -> str:
    """Return the host's name for titles: the setting, else the database's name. It raises nothing."""
    if settings.name:
        return settings.name
    from sqlalchemy.engine import make_url

    with suppress(SettingsError):
        return make_url(database_url(settings)).database or "trueup"
    return "trueup"


def _embedded_url(settings: Settings, name: str) -> str:
    with suppress(OSError, json.JSONDecodeError, KeyError):
        return str(json.loads(settings.stack_file.read_text())[name])
    raise SettingsError(
        f"{PREFIX}{name.upper()} is not set and no embedded stack runs in {settings.home}. "
        "Set the URL, or start the stack with `trueup up`."
    )
