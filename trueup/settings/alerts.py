"""Settings of alerts: `TRUEUP_ALERTS__WEBHOOK_URL`, or [alerts] in trueup.toml."""

import base64
import binascii
import hashlib
from functools import lru_cache
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from trueup.settings.urls import check_length, is_loopback, split_http_url

WEBHOOK = "webhook"
_CONDITIONS = ("tokens", "users", "unexplained_share", "defects", "missed_run_seconds", "missed_deep_run_seconds")
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES = 16


class AlertSettings(BaseModel):
    """Where alerts are sent, and which events raise one. Without a webhook and without apprise, none is raised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    webhook_url: SecretStr | None = Field(default=None, description="receives signed alerts")
    webhook_secret: SecretStr | None = Field(default=None, description="signs alerts: whsec_ and Base64, or 16+ bytes")
    webhook_allow_http: bool = Field(default=False, description="allow a webhook without TLS on another machine")
    webhook_timeout_seconds: float = Field(default=10.0, gt=0, le=50)
    apprise_urls: tuple[SecretStr, ...] = Field(default=(), description="receive alerts through apprise")
    tokens: int | None = Field(default=None, ge=1, description="alert: a run finds this many newly drifted tokens")
    users: int | None = Field(default=None, ge=1, description="alert: a run finds this many newly drifted counters")
    unexplained_share: float | None = Field(
        default=None, gt=0, le=1, description="alert: a run can't explain this share of its newly drifted tokens"
    )
    unexplained_tokens: int = Field(default=1000, ge=1, description="no such alert below this many unexplained tokens")
    defects: int | None = Field(default=None, ge=1, description="alert: a deep run finds this many defects")
    missed_run_seconds: int | None = Field(
        default=None, ge=0, description="alert: no run for this long; unset: twice the reconcile interval, 0: never"
    )
    missed_deep_run_seconds: int | None = Field(
        default=None, ge=0, description="alert: no deep run for this long; unset: twice the deep interval, 0: never"
    )
    max_attempts: int = Field(
        default=12, ge=1, le=100, description="an alert fails after this many attempts to send it"
    )

    @property
    def channels(self) -> dict[str, str]:
        """The channels by key, with a title for people. Without a channel no alert is raised.

        Each of apprise's URLs is a channel of its own, so that a retry after a failure is not sent to the others again.
        """
        found = {WEBHOOK: WEBHOOK} if self.webhook_url else {}
        for number, url in enumerate(self.apprise_urls, 1):
            found.setdefault(_channel_of(url.get_secret_value()), f"number {number} of apprise_urls")
        return found

    def apprise_url(self, channel: str) -> str | None:
        """Return the URL of one of apprise's channels; None: it was removed from the settings."""
        urls = (url.get_secret_value() for url in self.apprise_urls)
        return next((url for url in urls if _channel_of(url) == channel), None)

    @field_validator("webhook_url")
    @classmethod
    def _usable_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None or not url.get_secret_value():
            return None
        if split_http_url(url.get_secret_value()) is None:
            raise ValueError("give a URL: https://alerts.example/trueup")
        return url

    @field_validator("webhook_secret")
    @classmethod
    def _strong_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None or not secret.get_secret_value():
            return None
        check_length(_key(secret), MIN_SECRET_BYTES)
        return secret

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.webhook_url:
            if not self.webhook_secret:
                raise ValueError(
                    "webhook_url is set without webhook_secret: the receiver can't verify the sender. Set both"
                )
            parts = split_http_url(self.webhook_url.get_secret_value())
            if parts and parts.scheme == "http" and not (self.webhook_allow_http or is_loopback(parts.hostname)):
                raise ValueError("webhook_url is not https: use TLS, or set webhook_allow_http if the network is yours")
        if not self.channels:
            for name in _CONDITIONS:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set without webhook_url or apprise_urls: no alert could be sent")
        return self

    def signing_key(self) -> bytes:
        """Return the key that signs webhook messages; empty if no secret is set."""
        return _key(self.webhook_secret) if self.webhook_secret else b""


@lru_cache
def _channel_of(url: str) -> str:
    """Return the key of the URL's channel in the database. It does not depend on the order of the URLs.

    The URL is a secret. The key is a short, slow hash, so that the database does not help to guess the URL.
    """
    return f"apprise:{hashlib.scrypt(url.encode(), salt=b'trueup alerts', n=2**12, r=8, p=1, dklen=4).hex()}"


def _key(secret: SecretStr) -> bytes:
    text = secret.get_secret_value()
    if not text.startswith(SECRET_PREFIX):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"the text after {SECRET_PREFIX} is no Base64") from None
