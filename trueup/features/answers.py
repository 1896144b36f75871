"""Read a model's JSON answer: lenient about text around the JSON, strict about its contents."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings
_HALF_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9A-Fa-f]{0,3})?\Z")
_MAX_STARTS = 64  # positions tried as the start of JSON; an answer with more of them is not JSON


def objects_under(text: str, key: str) -> list[dict[str, Any]] | None:
    """Return the objects in the list named `key` of a model's answer; None if the answer has no such list.

    It skips code fences and prose around the JSON, accepts a list without a name, and keeps the complete objects of an
    answer that was cut off.
    """
    bare: list[dict[str, Any]] | None = None
    for value in _json_values(text):
        if isinstance(value, dict) and key in value:
            listed = value[key]
            return _only_objects(listed if isinstance(listed, list) else [listed])
        if isinstance(value, list) and bare is None and (not value or _only_objects(value)):
            bare = _only_objects(value)
    salvaged = _salvaged(text, key)
    return salvaged if salvaged is not None else bare


def scalar_under(text: str, key: str) -> object:
    """Return the value named `key` of the answer's outermost JSON object; None if there is none."""
    for value in _json_values(text):
        if isinstance(value, dict) and key in value:
            return value[key]
    return None


def object_with(text: str, key: str) -> dict[str, Any] | None:
    """Return the answer's outermost JSON object that has `key`; None if there is none.

    An object that was cut off is closed at its end, so that its beginning is not lost.
    """
    begun = _HALF_ESCAPE.sub(r"\1", text)
    for attempt in (text, begun + '"}', begun + "}"):
        for value in _json_values(attempt):
            if isinstance(value, dict) and key in value:
                return value
    return None


def text_of(value: object) -> str:
    """Return a string or number as one line of text; an empty string for any other value."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return " ".join(str(value).split())


def share_of(value: object, *, default: float) -> float:
    """Return a number between 0 and 1. A percentage is divided by 100; an unusable value gives `default`."""
    try:
        number = default if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return default
    if not math.isfinite(number) or number < 0 or number > 100:
        return default
    return number / 100 if number > 1 else number


def _json_values(text: str) -> Iterator[Any]:
    """Yield each outermost JSON object or list in the text."""
    position = 0
    for _ in range(_MAX_STARTS):
        starts = [found for found in (text.find("{", position), text.find("[", position)) if found >= 0]
        if not starts:
            return
        try:
            value, position = _DECODER.raw_decode(text, min(starts))
        except (ValueError, RecursionError):
            position = min(starts) + 1
        else:
            yield value


def _salvaged(text: str, key: str) -> list[dict[str, Any]] | None:
    opening = text.find("[", text.find(f'"{key}"')) if f'"{key}"' in text else text.find("[")
    if opening < 0:
        return None
    found: list[dict[str, Any]] = []
    position = opening + 1
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            break
        found.extend(_only_objects([value]))
    return found or None


def _only_objects(values: list[Any]) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]
