"""Error answers, and how the OpenAPI document declares them. All have one JSON shape, except a denial (402)."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from trueup.api.schemas import Body
from trueup.api.views import metrics
from trueup.errors import InvalidInputError, MissingExtraError, NotInstalledError, ServiceUnavailableError, TokensDenied
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
    denied = {"model": Denial, "description": "The gate denied the request; nothing was spent"}
    return {code: denied if code == 402 else _declared(code) for code in sorted(codes)}


def responses_to_text(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route with a plain-text success; with a model, FastAPI would declare errors as text too."""
    return {code: {name: part for name, part in _declared(code).items() if name != "model"} for code in sorted(codes)}


def _declared(code: int) -> dict[str, Any]:
    description, error_code, error, headers = _PROBLEMS[code]
    example = {"success": False, "error": error, "error_code": error_code}
    return {
        "model": Problem,
        "description": f"{HTTPStatus(code).phrase}: {description}",
        "headers": headers,
        "content": {"application/json": {"schema": _SCHEMA, "example": example}},
    }


logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5

# Codes and texts of errors that Starlette raises.
_CODES = {404: "not_found", 405: "method_not_allowed"}
_TEXTS = {
    404: "No resource has this address. The page /docs lists the addresses",
    405: "This address does not accept the method",
}


class ApiError(HTTPException):
    """An error answer. `error_code` is for machines, `error` for people."""

    def __init__(
        self, status_code: int, error_code: str, error: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status_code, detail=error, headers=headers)
        self.error_code = error_code


def unavailable(error: str, *, error_code: str = "service_unavailable") -> ApiError:
    """Return the 503 answer for a request that may succeed soon; its `Retry-After` is `RETRY_AFTER_SECONDS`."""
    return ApiError(503, error_code, error, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def invalid_input(field: str, problem: str) -> ApiError:
    """Return the 422 answer for wrong input. `field`: the name of the wrong field."""
    return ApiError(422, "invalid_input", f"{field}: {problem}")


def error_body(error_code: str, error: str) -> dict[str, Any]:
    """Return the body of every error answer except a denial."""
    return {"success": False, "error": error, "error_code": error_code}


def render(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error.error_code, error.detail), error.status_code, error.headers)


def register(app: FastAPI) -> None:
    """Register the handlers that turn errors into these answers."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(InvalidInputError, _invalid_input)
    app.add_exception_handler(TokensDenied, _denied)
    app.add_exception_handler(ServiceUnavailableError, _unavailable)
    app.add_exception_handler(NotInstalledError, _unavailable)
    app.add_exception_handler(MissingExtraError, _missing_extra)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ApiError):
        return render(error)
    assert isinstance(error, HTTPException)  # noqa: S101 - for the type checker: registered for this class
    if error.status_code == 400:  # FastAPI can't decode the body
        return render(invalid_input("body", "it can't be decoded: send JSON in UTF-8"))
    code = _CODES.get(error.status_code, "error")
    text = _TEXTS.get(error.status_code, str(error.detail))
    return render(ApiError(error.status_code, code, text, headers=error.headers))


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    """Name each wrong field and its problem. Never repeat the value, which may be secret or huge."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    problems = [f"{_field(fault['loc'])}: {_problem(fault)}" for fault in error.errors()]
    return JSONResponse(error_body("invalid_input", "; ".join(problems[:20])), 422)


def _field(location: tuple[Any, ...]) -> str:
    """Return a field's name without the part of the request (body, query, path) that it belongs to."""
    names = [str(part) for part in location[1:] if not isinstance(part, int) or len(location) > 2]
    return ".".join(names) or str(location[0])


def _problem(fault: Mapping[str, Any]) -> str:
    match fault["type"]:
        case "extra_forbidden":
            return "unknown field. Leave it out"
        case "json_invalid":
            return f"this is not JSON ({fault['ctx']['error']})"
        case _:
            return str(fault["msg"])


async def _invalid_input(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body("invalid_input", str(error)), 422)


async def _missing_extra(_request: Request, error: Exception) -> JSONResponse:
    """Answer that this server lacks the feature. Only the log names the packages to install."""
    logger.error("answered 501 reason=%s", error)
    return render(ApiError(501, "not_installed", "This server lacks the packages of this feature. Nothing was done"))


async def _denied(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TokensDenied)  # noqa: S101
    metrics.of(request).count_decision(error.error_code)
    return JSONResponse(error.payload, 402)


async def _unavailable(_request: Request, error: Exception) -> JSONResponse:
    """Answer that a service is not available. Only the log names the servers' addresses."""
    logger.error("answered 503 reason=%s", error)
    if isinstance(error, NotInstalledError):
        return render(unavailable("The database is not ready for trueup. Nothing was done", error_code="not_ready"))
    assert isinstance(error, ServiceUnavailableError)  # noqa: S101
    return render(unavailable(f"{error.service} does not answer. Nothing was spent by this request; try again"))
