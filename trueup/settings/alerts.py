"""Settings of alerts: `TRUEUP_ALERTS__WEBHOOK_URL`, or [alerts] in trueup.toml."""

import base64
import binascii
import hashlib
from functools import lru_cache
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from trueup.settings.urls import check_length, is_loopback, split_http_url

WEBHOOK = "webhook"
_GAPS = ("missed_run_seconds", "missed_deep_run_seconds")
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES = 16


class AlertSettings(BaseModel):
    """Where alerts go, and what is one. Without a webhook and without apprise there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    webhook_url: SecretStr | None = Field(default=None, description="alerts are sent there, signed")
    webhook_secret: SecretStr | None = Field(
        default=None, description="signs them: whsec_ and Base64, or a text of 16 bytes or more"
    )
    webhook_allow_http: bool = Field(default=False, description="allow a webhook without TLS beyond this machine")
    webhook_timeout_seconds: float = Field(default=10.0, gt=0, le=50)
    apprise_urls: tuple[SecretStr, ...] = Field(
        default=(), description="alerts are sent there too, through apprise if it is installed"
    )
    tokens: int | None = Field(default=None, ge=1, description="a run that finds so many newly drifted tokens")
    users: int | None = Field(default=None, ge=1, description="a run that finds so many users' counters newly drifted")
    unexplained_share: float | None = Field(
        default=None, gt=0, le=1, description="a run that can't explain this share of its newly drifted tokens"
    )
    unexplained_tokens: int = Field(
        default=1000, ge=1, description="fewer unexplained tokens are no alert, whatever their share"
    )
    defects: int | None = Field(default=None, ge=1, description="a deep run that finds so many defects")
    missed_run_seconds: int | None = Field(
        default=None, ge=0, description="no run for so long; unset means twice the reconcile interval, 0 never"
    )
    missed_deep_run_seconds: int | None = Field(
        default=None, ge=0, description="no deep run for so long; unset means twice the deep interval, 0 never"
    )
    max_attempts: int = Field(default=12, ge=1, le=100, description="sendings of an alert before it is given up")

    @property
    def channels(self) -> dict[str, str]:
        """Where alerts go, and what people call that; empty: nowhere, and so none are raised.

        Each of apprise's URLs is a channel: one that fails must not make the others receive an alert again.
        """
        found = {WEBHOOK: WEBHOOK} if self.webhook_url else {}
        for number, url in enumerate(self.apprise_urls, 1):
            found.setdefault(_channel_of(url.get_secret_value()), f"number {number} of apprise_urls")
        return found

    def apprise_url(self, channel: str) -> str | None:
        """Return the URL of one of apprise's channels; None: it is not among the settings any more."""
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
                raise ValueError("webhook_url is set without webhook_secret: a receiver could not tell who sends")
            parts = split_http_url(self.webhook_url.get_secret_value())
            if parts and parts.scheme == "http" and not (self.webhook_allow_http or is_loopback(parts.hostname)):
                raise ValueError("webhook_url is not https: use TLS, or set webhook_allow_http if the network is yours")
        if not self.channels:
            lonely = [
                name
                for name in ("tokens", "users", "unexplained_share", "defects", *_GAPS)
                if getattr(self, name) is not None
            ]
            if lonely:
                raise ValueError(
                    f"{lonely[0]} is set, but neither webhook_url nor apprise_urls: nobody would hear of it"
                )
        return self

    def signing_key(self) -> bytes:
        """Return the key that signs a webhook's messages."""
        return _key(self.webhook_secret) if self.webhook_secret else b""


@lru_cache
def _channel_of(url: str) -> str:
    """Return the name under which alerts on their way to the URL are kept, wherever it stands among the others.

    The URL is a secret: what is in the database is of no use to find it, being short and slow to come by.
    """
    return f"apprise:{hashlib.scrypt(url.encode(), salt=b'trueup alerts', n=2**12, r=8, p=1, dklen=4).hex()}"


def _key(secret: SecretStr) -> bytes:
    text = secret.get_secret_value()
    if not text.startswith(SECRET_PREFIX):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"what follows {SECRET_PREFIX} is no Base64") from None
