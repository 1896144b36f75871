"""Settings of the HTTP interface: `TRUEUP_API__JWT_SECRET`, or [api] in trueup.toml."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from trueup.settings.urls import check_length, is_loopback, split_http_url

MIN_SECRET_BYTES = 32  # RFC 7518, 3.2: an HS256 key is no shorter than its hash
_KEYS = ("jwt_secret", "jwks_file", "jwks_url")


class ApiSettings(BaseModel):
    """Where the API is served, whose tokens it takes, and how much it lets in. Without a key it is not served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to serve on; 0.0.0.0 for all of this machine's")
    port: int = Field(default=8000, ge=1, le=65_535)
    demo: bool = Field(
        default=False, description="serve without a key, on loopback only: the bearer token is the user's id itself"
    )

    jwt_secret: SecretStr | None = Field(default=None, description="takes HS256 tokens signed with it")
    jwks_file: Path | None = Field(default=None, description="takes RS256 and ES256 tokens of its public keys")
    jwks_url: str | None = Field(default=None, description="the same, from the issuer itself")
    jwks_max_age_seconds: int = Field(default=600, ge=10, description="the keys of jwks_url are read again after this")
    jwks_retry_seconds: int = Field(
        default=10, ge=1, description="for an unknown key, jwks_url is asked at most this often"
    )
    jwks_timeout_seconds: float = Field(default=3.0, gt=0, le=30)
    issuer: str | None = Field(default=None, description="the token's iss; unset means any")
    audience: str | None = Field(default=None, description="the token's aud; unset means that it has none")
    leeway_seconds: int = Field(default=10, ge=0, le=300, description="by how much clocks may differ")
    user_id_claim: str = Field(default="user_id", min_length=1)
    scope_claim: str = Field(default="scope", min_length=1, description="a list, or a text with spaces between")
    operator_scope: str = Field(default="trueup:operator", min_length=1, description="may read drift and metrics")

    max_body_bytes: int = Field(default=262_144, ge=1024, le=100_000_000)
    max_requests: int = Field(default=1000, ge=1, description="at once; more are refused with 503")
    rate_limit_per_minute: int = Field(default=600, ge=0, description="requests of one user; 0 means any number")
    max_wait_seconds: int = Field(
        default=30, ge=0, le=300, description="a request may wait for its task's result at most this long"
    )
    threads: int = Field(default=20, ge=1, le=500, description="requests that are worked on at once")
    public_metrics: bool = Field(default=False, description="show /metrics without an operator's token")

    @property
    def has_key(self) -> bool:
        """Whether there is a key to check tokens with."""
        return any(getattr(self, name) for name in _KEYS)

    @field_validator("jwt_secret")
    @classmethod
    def _strong_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None or not secret.get_secret_value():
            return None
        check_length(secret.get_secret_value().encode(), MIN_SECRET_BYTES)
        return secret

    @field_validator("jwks_url")
    @classmethod
    def _usable_url(cls, url: str | None) -> str | None:
        if not url:
            return None
        parts = split_http_url(url)
        if parts is None or "@" in parts.netloc:
            raise ValueError("give a URL without a password: https://issuer.example/.well-known/jwks.json")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError("not https: whoever is on the way could put a key of his own there")
        return url

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> Self:
        given = [name for name in _KEYS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are set: give one of them, or a token could choose its key")
        if self.demo and given:
            raise ValueError(f"demo and {given[0]} are set: with demo nobody's token is checked. Unset one of them")
        if self.demo and not is_loopback(self.host):
            raise ValueError(f"demo is set and host is {self.host}: without a key the API is served on loopback only")
        return self
