"""How figures and texts are shown to people, the same in terminals and on pages."""

import re
from datetime import datetime
from typing import Any

# A terminal obeys these characters, which a host's id or name may contain. On a page they would turn text around.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def show(value: Any) -> str:
    """Return a value for people: thousands separated, times to the second in UTC, None as a dash.

    A control character is shown as �, because a terminal would obey it.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return _CONTROL.sub("�", str(value))


def count_of(number: int, noun: str) -> str:
    """Return a count with its noun in the right number: "1 error", "1,200 errors"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def compact(tokens: int) -> str:
    """Return a count that fits a tile: up to 9,999,999 in full, then 12.3 M, 4.5 bn, 1.0 tn."""
    for unit, size in (("tn", 10**12), ("bn", 10**9), ("M", 10**6)):
        if abs(tokens) >= max(size, 10**7):
            return f"{tokens / size:,.1f} {unit}"
    return f"{tokens:,}"


def signed(tokens: int) -> str:
    """Return a count of tokens with its sign."""
    return f"{tokens:+,}".replace("-", "−")


def percent(share: float | None) -> str:
    """Return a share as a percentage. Only a share of 1 is shown as 100 %, and only 0 as 0 %."""
    if share is None:
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %".replace(".0 %", " %")
