"""Routes for browsers: every error is a page that says what happened and what to do, where the API answers JSON."""

import logging
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from trueup.api.errors import RETRY_AFTER_SECONDS, ApiError
from trueup.api.page.rendering import pages_of
from trueup.api.page.viewers import PageRefusal, Viewer, visitor
from trueup.errors import NotInstalledError, ServiceUnavailableError

logger = logging.getLogger(__name__)


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (PageRefusal, ApiError, RequestValidationError, ServiceUnavailableError, NotInstalledError) as error:
                response = pages_of(request).refusal(request, _visitor(request), _refusal(error))
                if isinstance(error, ApiError):
                    response.headers.update(error.headers or {})
                elif response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
                    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
                return response

        return answer


def _visitor(request: Request) -> Viewer | None:
    """Return who gets the page; None: a request whose form would not be taken."""
    try:
        return visitor(request)
    except PageRefusal:
        return None


def _refusal(error: Exception) -> PageRefusal:
    match error:
        case PageRefusal():
            return error
        case ApiError():
            return PageRefusal(error.status_code, HTTPStatus(error.status_code).phrase, f"{error.detail}.")
        case RequestValidationError():
            return PageRefusal(
                404, "No page has this address", "The live page is at /, and /docs lists the API's addresses."
            )
    logger.error("page answered 503 reason=%s", error)
    if isinstance(error, ServiceUnavailableError):
        sentence = f"{error.service} does not answer, so nothing was shown or written. Reload the page in a moment."
        return PageRefusal(503, f"{error.service} does not answer", sentence)
    sentence = "Nothing was shown or written. `trueup doctor` says what is missing."
    return PageRefusal(503, "The database is not ready for trueup", sentence)
