"""Error answers as the OpenAPI document declares them."""

from http import HTTPStatus
from typing import Any, Literal

from pydantic import Field

from trueup.api.schemas import Body
from trueup.gate.denial import Reason


class Problem(Body):
    """An error answer that is not a denial. `error_code` is for machines, `error` for people."""

    success: Literal[False]
    error: str
    error_code: str


class Denial(Body):
    """The gate denied the request. Tokens are counts; `days_remaining` null means unlimited."""

    success: Literal[False]
    error: str = Field(examples=["No tokens remaining in subscription"])
    error_code: Reason = Field(examples=["no_tokens_remaining"])
    tokens_remaining: int = Field(examples=[0])
    original_tokens: int = Field(examples=[10_000])
    consumed_tokens: int = Field(examples=[10_000])
    days_remaining: int | None = Field(examples=[25])


_SCHEMA = {"$ref": "#/components/schemas/Problem"}
_CHALLENGE = {"WWW-Authenticate": {"description": "The problem with the token", "schema": {"type": "string"}}}
_RETRY = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}}
_PROBLEMS: dict[int, tuple[str, str, str, dict[str, Any]]] = {
    401: ("The request has no valid token", "not_authenticated", "The token has expired", _CHALLENGE),
    403: ("The token lacks the scope", "missing_scope", "The token lacks the scope trueup:operator", _CHALLENGE),
    404: ("The resource does not exist", "not_found", "No resource has this address", {}),
    409: ("An earlier request has the same key", "conflict", "This key was used for another request", {}),
    413: ("The body is too large", "body_too_large", "The body is larger than 262144 bytes", {}),
    422: ("The input is wrong; `error` names the field", "invalid_input", "limit: give 1 to 100", {}),
    429: ("This user sent too many requests", "too_many_requests", "More than 600 requests within a minute", _RETRY),
    500: ("The server failed", "internal_error", "The request failed on the server. Its log names the cause", {}),
    501: (
        "The feature is not installed on this server",
        "not_installed",
        "This server lacks the packages of this feature. Nothing was done",
        {},
    ),
    503: (
        "A server does not answer, or the API is overloaded",
        "service_unavailable",
        "PostgreSQL does not answer. Nothing was spent by this request; try again",
        _RETRY,
    ),
}
# Error codes of every route that needs a token.
AUTHENTICATED = (401, 422, 429, 503)


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the answers with these codes for a route's `responses`: 402 is a `Denial`, the others are `Problem`s."""
    return {code: _denied() if code == 402 else _problem(code) for code in sorted(codes)}


def responses_to_text(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route with a plain-text success; with a model, FastAPI would declare errors as text too."""
    return {code: {name: part for name, part in _problem(code).items() if name != "model"} for code in sorted(codes)}


def _denied() -> dict[str, Any]:
    return {"model": Denial, "description": "The gate denied the request; nothing was spent"}


def _problem(code: int) -> dict[str, Any]:
    description, error_code, error, headers = _PROBLEMS[code]
    example = {"success": False, "error": error, "error_code": error_code}
    return {
        "model": Problem,
        "description": f"{HTTPStatus(code).phrase}: {description}",
        "headers": headers,
        "content": {"application/json": {"schema": _SCHEMA, "example": example}},
    }
