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
