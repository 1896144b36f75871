"""A task's identity: its id, the fingerprint of its request, and the retries that asked for new answers."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from celery import Task
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from trueup.errors import AnswerFormatError, TrueupError
from trueup.gate.holds import Hold

# The fingerprint of the task's first request. A retry carries it, because the body may retry with other arguments.
REQUEST_HEADER = "trueup_request"
# How often the body has asked for new answers by a retry.
FRESH_RETRIES_HEADER = "trueup_fresh_retries"


def request_fingerprint(task_name: str, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the fingerprint of a request: of the task's name and the parsed arguments, the user among them.

    An argument that equals its default is left out, so that a release that adds a parameter changes no fingerprint.
    """
    values = {name: _canonical(value) for name, value in arguments.items()}
    given = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    return hashlib.sha256(json.dumps([task_name, given], sort_keys=True).encode()).hexdigest()[:16]


def canonical_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters' defaults in the form in which `request_fingerprint` compares them."""
    return {name: _canonical(value) for name, value in defaults.items()}


def identity_of(task: Task, fingerprint: str) -> tuple[str, int]:
    """Return what the running task's message says: the fingerprint of its first request, and its fresh retries.

    `fingerprint`: the one of this message's own arguments, for a message that carries none.
    """
    headers = task.request.headers or {}
    return str(headers.get(REQUEST_HEADER) or fingerprint), int(headers.get(FRESH_RETRIES_HEADER) or 0)


def is_random_id(task_id: str) -> bool:
    """Return whether the id is a random UUID, as Celery makes them: no other request has it."""
    try:
        return uuid.UUID(task_id).version == 4
    except ValueError:
        return False


def retry_headers(headers: Mapping[str, Any] | None, hold: Hold, *, is_fresh: bool) -> dict[str, Any]:
    """Return the headers of a retry. `is_fresh`: its calls are bought anew; otherwise paid calls are replayed."""
    own = {REQUEST_HEADER: hold.request, FRESH_RETRIES_HEADER: hold.fresh_retries + is_fresh}
    return {**(headers or {}), **own}


def asks_for_new_answers(cause: BaseException | None) -> bool:
    """Return whether a retry that the body raised for this cause rejects the answers that the body has bought.

    It does not when the cause is trueup's own error: a call or a server failed, and the calls before it were good. An
    answer in the wrong format is the exception.
    """
    return isinstance(cause, AnswerFormatError) or not isinstance(cause, TrueupError)


def _canonical(value: Any) -> Any:
    """Return a value as JSON that is the same in every process: sets are sorted, models and dataclasses are dicts."""
    if isinstance(value, BaseModel):
        return _canonical(dict(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _canonical(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_canonical(item) for item in value), key=json.dumps)
    # An object of another kind counts by its type alone, because its text may differ between processes.
    return to_jsonable_python(value, bytes_mode="base64", fallback=lambda item: type(item).__qualname__)
