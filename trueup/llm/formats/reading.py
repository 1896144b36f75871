"""Read JSON of clients and servers without trusting it."""

import json
from collections.abc import Iterator
from typing import Any

from trueup.errors import UnboundedCallError

MAX_TOKENS = 2**31 - 1


def object_of(value: object) -> dict[str, Any]:
    """Return the value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: object) -> list[Any]:
    """Return the value if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def count_of(value: object) -> int | None:
    """Return a plausible count of tokens. None: the value is missing or none. Some servers write counts as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        return None
    return value


def first_count(figures: dict[str, Any], *names: str, otherwise: int | None = None) -> int | None:
    """Return the first of these figures that is reported; `otherwise` if none is. None: it is no plausible count."""
    return count_of(next((figures[name] for name in names if figures.get(name) is not None), otherwise))


def requested_count(body: dict[str, Any], *names: str, least: int = 1) -> int | None:
    """Return the first count that a request gives under these names; None if it gives none.

    `least`: a smaller count, down to 0, becomes this. A negative count asks for an answer without a limit on some
    servers, so it is None. Raises `UnboundedCallError` for any other value.
    """
    name = next((name for name in names if body.get(name) is not None), None)
    if name is None:
        return None
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnboundedCallError(f"the request's {name!r} is {value!r:.40}, not a whole number", "Send a number.")
    return None if value < 0 else max(value, least)


def strings_in(value: object, *, without: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield every string in a JSON value, at any depth, except under the names in `without`."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(part for name, part in item.items() if name not in without)
        elif isinstance(item, list):
            stack.extend(item)


def as_text(value: object) -> str:
    """Return a JSON value as the text by which its tokens are counted."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parsed(data: bytes | str) -> Any:
    """Return the JSON value; None if the data is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
