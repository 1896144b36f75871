"""Settings of the HTTP API: `TRUEUP_API__JWT_SECRET`, or [api] in trueup.toml."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from trueup.settings.urls import check_length, is_loopback, split_http_url

MIN_SECRET_BYTES = 32  # RFC 7518, 3.2: an HS256 key is no shorter than its hash
_KEYS = ("jwt_secret", "jwks_file", "jwks_url")


class ApiSettings(BaseModel):
    """Where the API listens, which bearer tokens it accepts, and its limits. Without a key the API does not start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all addresses")
    port: int = Field(default=8000, ge=1, le=65_535)
    demo: bool = Field(default=False, description="no key, loopback only: the bearer token is the user's id itself")

    local_page: Literal["open", "login"] | None = Field(
        default=None,
        description="no key, loopback only: serve the page alone, open to this machine or by links of `trueup page`",
    )

    jwt_secret: SecretStr | None = Field(default=None, description="accept HS256 tokens signed with this")
    jwks_file: Path | None = Field(default=None, description="accept RS256 and ES256 tokens of these public keys")
    jwks_url: str | None = Field(default=None, description="the same, with the keys from the issuer")
    jwks_max_age_seconds: int = Field(default=600, ge=10, description="jwks_url is read again after this")
    jwks_retry_seconds: int = Field(default=10, ge=1, description="minimum time between requests for an unknown key")
    jwks_timeout_seconds: float = Field(default=3.0, gt=0, le=30)
    issuer: str | None = Field(default=None, description="the token's iss; unset: any")
    audience: str | None = Field(default=None, description="the token's aud; unset: the token has none")
    leeway_seconds: int = Field(default=10, ge=0, le=300, description="accepted difference of clocks")
    user_id_claim: str = Field(default="user_id", min_length=1)
    scope_claim: str = Field(default="scope", min_length=1, description="a list, or a text separated by spaces")
    operator_scope: str = Field(default="trueup:operator", min_length=1, description="may read drift and metrics")

    max_body_bytes: int = Field(default=262_144, ge=1024, le=100_000_000)
    max_requests: int = Field(default=1000, ge=1, description="concurrent requests; more get 503")
    rate_limit_per_minute: int = Field(default=600, ge=0, description="requests of one user; 0: no limit")
    max_wait_seconds: int = Field(
        default=30, ge=0, le=300, description="maximum wait of a request for its task's result"
    )
    threads: int = Field(default=20, ge=1, le=500, description="requests that run at the same time")
    public_metrics: bool = Field(default=False, description="serve /metrics without an operator's token")

    @property
    def has_key(self) -> bool:
        """Whether a key is set that verifies tokens."""
        return any(getattr(self, name) for name in _KEYS)

    @property
    def local_address(self) -> tuple[str, int]:
        """The host and port at which a program on this machine reaches the API."""
        return self.host if is_loopback(self.host) else "::1" if ":" in self.host else "127.0.0.1", self.port

    @property
    def local_url(self) -> str:
        """The URL of the live page on this machine."""
        host, port = self.local_address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

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
            raise ValueError("not https: an attacker on the network could replace the keys. Give an https URL")
        return url

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> Self:
        given = [name for name in _KEYS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are set: a token could choose its key. Give one of them")
        if self.demo and given:
            raise ValueError(f"demo and {given[0]} are set: with demo no token is verified. Unset one of them")
        if self.demo and not is_loopback(self.host):
            raise ValueError(f"demo is set and host is {self.host}: without a key the API is served on loopback only")
        if self.local_page and (given or self.demo):
            other = given[0] if given else "demo"
            raise ValueError(
                f"local_page and {other} are set: the page is served with {other} anyway. Unset local_page"
            )
        if self.local_page and not is_loopback(self.host):
            raise ValueError(f"local_page is set and host is {self.host}: without a key the page is for loopback only")
        return self
