"""Checks for settings that are URLs or secrets."""

import ipaddress
from urllib.parse import SplitResult, urlsplit


def split_http_url(url: str) -> SplitResult | None:
    """Return the parts of an HTTP or HTTPS URL with a host; None for any other text."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return None
    return parts if usable else None


ESCAPE = "its password has a special character: percent-encode it (/ is %2F, # is %23, ? is %3F, @ is %40, % is %25)"
"""Why a URL can't be read, without any part of it: what is quoted might be a part of its password."""


def is_readable(url: str) -> bool:
    """Return whether a server's URL is split where its writer meant it: no special character ends its password early.

    A sentinel URL names several servers, one after each semicolon.
    """
    for one in url.split(";"):
        authority, rest = _split_authority(one.partition("://")[2])
        try:
            _ = urlsplit(one).port
        except ValueError:
            return False
        if authority and "@" in rest:
            return False
    return True


def _split_authority(rest: str) -> tuple[str, str]:
    end = next((place for place, character in enumerate(rest) if character in "/?#"), len(rest))
    return rest[:end], rest[end:]


def is_loopback(host: str | None) -> bool:
    """Return whether other machines can't reach this address or name."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def check_length(secret: bytes, minimum: int) -> None:
    """Raise ValueError for a secret shorter than `minimum` bytes."""
    if len(secret) < minimum:
        raise ValueError(f"too short: give {minimum} random bytes or more")
