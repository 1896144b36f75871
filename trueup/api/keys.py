"""The keys that verify tokens. A key's type decides its one algorithm; the token never does."""

import json
import logging
import threading
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import httpx
import jwt

from trueup.errors import SettingsError
from trueup.settings.api import ApiSettings

logger = logging.getLogger(__name__)

# RSA keys verify RS256, P-256 keys ES256. Other keys of a JWKS are ignored, above all symmetric ones.
_ALGORITHMS = {("RSA", None): "RS256", ("EC", "P-256"): "ES256"}
MIN_RSA_BITS = 2048
MAX_JWKS_BYTES = 1_000_000


class UnknownKeyError(Exception):
    """None of the known keys has the key id of this token."""


class KeysUnavailableError(Exception):
    """The issuer's keys could not be read, and no earlier keys are known."""


class Keys(Protocol):
    """A source of keys."""

    def find(self, header: dict[str, Any]) -> jwt.PyJWK:
        """Return the key for a token with this header. Raises `UnknownKeyError` or `KeysUnavailableError`."""


def keys_of(settings: ApiSettings) -> Keys | None:
    """Return the configured keys; None: none is configured. Raises `SettingsError` for a file without a usable key."""
    if settings.jwt_secret:
        return SecretKey(settings.jwt_secret.get_secret_value().encode())
    if settings.jwks_file:
        return KeySet(read_jwks_file(settings.jwks_file))
    if settings.jwks_url:
        return RemoteKeySet(settings)
    return None


class SecretKey:
    """One secret that the issuer shares, for HS256."""

    def __init__(self, secret: bytes) -> None:
        encoded = jwt.utils.base64url_encode(secret).decode()
        self._key = jwt.PyJWK({"kty": "oct", "k": encoded}, algorithm="HS256")

    def find(self, header: dict[str, Any]) -> jwt.PyJWK:
        return self._key


class KeySet:
    """Public keys by `kid`. A token without a `kid` is verified with the only key, if there is exactly one."""

    def __init__(self, keys: dict[str | None, jwt.PyJWK]) -> None:
        self._keys = keys

    def find(self, header: dict[str, Any]) -> jwt.PyJWK:
        key = self.get(header)
        if key is None:
            raise UnknownKeyError
        return key

    def get(self, header: dict[str, Any]) -> jwt.PyJWK | None:
        """Return the key for a token with this header; None: there is none."""
        kid = header.get("kid")
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)


class RemoteKeySet:
    """The issuer's JWKS. It is read again when it is old and, at limited intervals, for an unknown `kid`.

    Known keys stay in use while the issuer does not answer. PyJWT's `PyJWKClient` (2.15) can't replace this class: it
    drops old keys while the issuer is down, calls a failing issuer for each request, holds its lock during the call, so
    that a slow issuer blocks all requests, and reads an answer of any size for any time.
    """

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._keys: KeySet | None = None
        self._asked_at = float("-inf")
        self._read_at = float("-inf")
        self._lock = threading.Lock()

    def find(self, header: dict[str, Any]) -> jwt.PyJWK:
        known = self._keys
        key = known.get(header) if known is not None else None
        if key is not None and monotonic() - self._read_at < self._settings.jwks_max_age_seconds:
            return key
        # Only a request without a usable key waits for another thread's refresh; one slow issuer must not block all.
        if self._lock.acquire(blocking=key is None):
            try:
                self._refresh(known)
            finally:
                self._lock.release()
        if self._keys is None:
            raise KeysUnavailableError
        return self._keys.find(header)

    def _refresh(self, seen: KeySet | None) -> None:
        """Read the keys again, unless another thread has replaced `seen` or the last attempt was just now.

        The caller holds the lock.
        """
        if self._keys is not seen or monotonic() - self._asked_at < self._settings.jwks_retry_seconds:
            return
        try:
            self._keys = KeySet(parse_jwks(self._fetch()))
            self._read_at = monotonic()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            logger.warning("JWKS not read url=%s error=%s", self._settings.jwks_url, error)
        finally:
            self._asked_at = monotonic()

    def _fetch(self) -> bytes:
        assert self._settings.jwks_url is not None  # noqa: S101 - for the type checker: keys_of checked it
        timeout = httpx.Timeout(self._settings.jwks_timeout_seconds)
        # httpx's timeout limits each read only; an answer that arrives byte by byte would never end.
        deadline = monotonic() + self._settings.jwks_timeout_seconds
        # A redirect could lead to a server without TLS.
        with httpx.stream("GET", self._settings.jwks_url, timeout=timeout, follow_redirects=False) as answer:
            if answer.status_code != 200:
                raise ValueError(f"the server answered {answer.status_code}")
            content = b""
            for part in answer.iter_bytes():
                content += part
                if len(content) > MAX_JWKS_BYTES:
                    raise ValueError(f"the answer has more than {MAX_JWKS_BYTES} bytes")
                if monotonic() > deadline:
                    raise ValueError(f"the answer took more than {self._settings.jwks_timeout_seconds} s")
        return content


def read_jwks_file(path: Path) -> dict[str | None, jwt.PyJWK]:
    """Return the keys in a file by `kid`. Raises `SettingsError` if it has no usable key."""
    try:
        return parse_jwks(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"TRUEUP_API__JWKS_FILE: {path}: {error}. The API was not started. Set it to a JWKS file with the issuer's "
            "public RSA or P-256 keys."
        ) from None


def parse_jwks(content: bytes) -> dict[str | None, jwt.PyJWK]:
    """Return the usable public keys of a JWKS by `kid`, and skip all others. Raises ValueError if none is usable."""
    try:
        listed = json.loads(content)["keys"]
        usable = {entry.get("kid"): key for entry in listed if (key := _public_key(entry)) is not None}
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('it is not a JWKS, which is an object with a list "keys"') from None
    if not usable:
        raise ValueError("it has no usable key")
    return usable


def _public_key(entry: dict[str, Any]) -> jwt.PyJWK | None:
    kind = entry.get("kty")
    algorithm = _ALGORITHMS.get((str(kind), entry.get("crv") if kind == "EC" else None))
    if algorithm is None or entry.get("alg", algorithm) != algorithm or entry.get("use", "sig") != "sig":
        return None
    # Drop the private parts, should the set hold a private key by mistake.
    public: dict[str, Any] = {name: entry[name] for name in ("kty", "crv", "n", "e", "x", "y") if name in entry}
    try:
        key = jwt.PyJWK(public, algorithm=algorithm)
    except jwt.PyJWTError:
        return None
    return None if kind == "RSA" and key.key.key_size < MIN_RSA_BITS else key
