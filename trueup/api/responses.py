"""The answers that are no success, as the OpenAPI document declares them."""

from http import HTTPStatus
from typing import Any, Literal

from pydantic import Field

from trueup.api.schemas import Body
from trueup.gate.denial import Reason


class Problem(Body):
    """Every answer that is neither a success nor a denial. `error_code` is for machines, `error` for people."""

    success: Literal[False]
    error: str
    error_code: str


class Denial(Body):
    """The gate said no. Tokens are counts; `days_remaining` null means unlimited."""

    success: Literal[False]
    error: str = Field(examples=["No tokens remaining in subscription"])
    error_code: Reason = Field(examples=["no_tokens_remaining"])
    tokens_remaining: int = Field(examples=[0])
    original_tokens: int = Field(examples=[10_000])
    consumed_tokens: int = Field(examples=[10_000])
    days_remaining: int | None = Field(examples=[25])


_SCHEMA = {"$ref": "#/components/schemas/Problem"}
_CHALLENGE = {"WWW-Authenticate": {"description": "What is wrong with the token", "schema": {"type": "string"}}}
_RETRY = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}}
_PROBLEMS: dict[int, tuple[str, str, str, dict[str, Any]]] = {
    401: ("No token, or none that is valid", "not_authenticated", "The token has expired", _CHALLENGE),
    403: ("The token lacks the scope", "missing_scope", "This needs the scope trueup:operator", _CHALLENGE),
    404: ("There is none", "not_found", "There is nothing at this address", {}),
    409: ("It contradicts what was sent before", "conflict", "This key was used for another request", {}),
    413: ("The body is too large", "body_too_large", "The body is larger than 262144 bytes", {}),
    422: ("The input is wrong; `error` names the field", "invalid_input", "limit: give 1 to 100", {}),
    429: ("Too many requests of this user", "too_many_requests", "More than 600 requests within a minute", _RETRY),
    500: ("Something went wrong here", "internal_error", "Something went wrong here, and was logged", {}),
    503: (
        "A server does not answer, or too much is going on",
        "service_unavailable",
        "PostgreSQL does not answer. Nothing was spent by this request; try again",
        _RETRY,
    ),
}
# Whatever needs a token may be answered so.
AUTHENTICATED = (401, 422, 429, 503)


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return these answers for a route's `responses`: 402 is a denial, all others problems."""
    return {code: _denied() if code == 402 else _problem(code) for code in sorted(codes)}


def responses_to_text(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route whose success is plain text: FastAPI would take a model's for text too."""
    return {code: {name: part for name, part in _problem(code).items() if name != "model"} for code in sorted(codes)}


def _denied() -> dict[str, Any]:
    return {"model": Denial, "description": "The gate said no; nothing was spent"}


def _problem(code: int) -> dict[str, Any]:
    description, error_code, error, headers = _PROBLEMS[code]
    example = {"success": False, "error": error, "error_code": error_code}
    return {
        "model": Problem,
        "description": f"{HTTPStatus(code).phrase}: {description}",
        "headers": headers,
        "content": {"application/json": {"schema": _SCHEMA, "example": example}},
    }
