"""Can a worker read a message? Checked before Celery sees it, because some messages end Celery's worker.

Celery and kombu rely in a worker's main process on what is checked here, and do not check it themselves.
"""

import base64
from datetime import UTC, datetime
from typing import Any

from celery.utils.time import maybe_iso8601
from kombu import compression
from kombu.utils import encoding, json

_CONTENT_TYPE = "application/json"
_CONTENT_ENCODINGS = ("utf-8", "us-ascii", "binary")
_TIMES = ("eta", "expires")
_TEXT_OR_NONE = (*_TIMES, "root_id", "parent_id", "group", "shadow", "origin", "argsrepr", "kwargsrepr")
_NUMBERS_OR_NONE = ("group_index", "retries", "replaced_task_nesting")


class _UnreadableError(Exception):
    """The reason why a message can't be read."""


def find_problem(message: bytes) -> str | None:
    """Return why a worker can't read a message as it stands in Redis; None: it can."""
    try:
        _check(json.loads(encoding.bytes_to_str(message)))  # type: ignore[no-untyped-call]
    except _UnreadableError as problem:
        return str(problem)
    # Decoding calls what the message names, and fails in many ways; RecursionError is one.
    except Exception as error:  # noqa: BLE001
        return f"it can't be decoded: {type(error).__name__}: {error}"[:300]
    return None


def _check(message: Any) -> None:
    _expect(isinstance(message, dict), "it is no JSON object")
    properties, headers = message.get("properties"), message.get("headers")
    _expect(isinstance(properties, dict), "properties is no object")
    _expect(isinstance(headers, dict), "headers is no object")
    _check_properties(properties)
    content = _content_of(message, properties, headers)
    _check_task(headers if "task" in headers else content, headers)
    if "task" in headers:
        _check_body(content)


def _check_properties(properties: dict[str, Any]) -> None:
    _expect(_is_name(properties.get("delivery_tag")), "properties.delivery_tag is no text")
    info: Any = properties.get("delivery_info")
    _expect(isinstance(info, dict), "properties.delivery_info is no object")
    for name in ("exchange", "routing_key"):
        _expect(isinstance(info.get(name), str), f"properties.delivery_info.{name} is no text")
    for name in ("correlation_id", "reply_to"):
        _expect(isinstance(properties.get(name), str | None), f"properties.{name} is no text")
    _expect(_is_number(properties.get("priority")), "properties.priority is no number")
    _expect(properties.get("body_encoding") in (None, "base64"), "properties.body_encoding is not base64")


def _content_of(message: dict[str, Any], properties: dict[str, Any], headers: dict[str, Any]) -> Any:
    """Return the decoded body."""
    _expect(message.get("content-type") == _CONTENT_TYPE, f"content-type is not {_CONTENT_TYPE}")
    charset = message.get("content-encoding")
    _expect(isinstance(charset, str) and charset.lower() in _CONTENT_ENCODINGS, "content-encoding is not utf-8")
    body: Any = message.get("body")
    _expect(isinstance(body, str), "body is no text")
    decoded = base64.b64decode(body, validate=True) if properties.get("body_encoding") else body.encode()
    if headers.get("compression"):
        decoded = compression.decompress(decoded, headers["compression"])  # type: ignore[no-untyped-call]
    return json.loads(decoded.decode())  # type: ignore[no-untyped-call]


def _check_task(task: Any, headers: dict[str, Any]) -> None:
    """`task`: what names the task and its id: the headers, or the body of Celery's first protocol."""
    _expect(isinstance(task, dict), "neither headers nor body name a task")
    for name in ("task", "id"):
        _expect(_is_name(task.get(name)), f"{name} is no text")
    for name in _TEXT_OR_NONE:
        _expect(isinstance(task.get(name), str | None), f"{name} is no text")
    for name in _TIMES:
        _check_time(maybe_iso8601(task.get(name)))
    for name in _NUMBERS_OR_NONE:
        _expect(_is_number(task.get(name)), f"{name} is no whole number")
    limits = task.get("timelimit")
    _expect(
        limits is None or (isinstance(limits, list) and len(limits) == 2 and all(map(_is_limit, limits))),
        "timelimit is not two numbers of seconds",
    )
    _expect(isinstance(headers.get("stamps"), dict | None), "stamps is no object")
    _expect(isinstance(headers.get("stamped_headers"), list | None), "stamped_headers is no list")


def _check_body(body: Any) -> None:
    _expect(isinstance(body, list) and len(body) == 3, "body is not [args, kwargs, embed]")
    for part, kind, name in zip(body, (list, dict, dict), ("args", "kwargs", "embed"), strict=True):
        _expect(isinstance(part, kind), f"{name} of the body is no {kind.__name__}")


def _check_time(moment: datetime | None) -> None:
    """Raise OverflowError for a time that is in no year of UTC's."""
    if moment is not None and moment.tzinfo is not None:
        moment.astimezone(UTC)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_limit(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _UnreadableError(otherwise)
