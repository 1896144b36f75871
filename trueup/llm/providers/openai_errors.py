"""What can go wrong with an OpenAI-compatible server, translated in one place and without ever showing the key."""

from contextlib import suppress
from typing import Any

import httpx2
import openai

from trueup.errors import ProviderError
from trueup.llm.texts import cut_at_word

SDK_ERRORS = (openai.OpenAIError, httpx2.HTTPError)
"""What the SDK raises; it lets its HTTP client's own errors through while it reads the body of a refusal."""

# Raised before a request has left, so that no provider can have worked on it. Of every other failure that is not
# known: a server may have read the whole request although the connection then broke.
_NEVER_SENT = (
    httpx2.ConnectError,  # refused, no such name, or TLS not agreed on
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
    httpx2.LocalProtocolError,
    httpx2.TooManyRedirects,
)
_RETRYABLE_STATUS = frozenset({408, 409, 429})
_DETAIL_CHARACTERS = 300

_REMEDIES = {
    400: "Check TRUEUP_MODEL_NAME and TRUEUP_MODEL_MAX_TOKENS_PARAMETER.",
    401: "Check TRUEUP_OPENAI_API_KEY.",
    403: "Check that the key of TRUEUP_OPENAI_API_KEY may use this model.",
    404: "Check TRUEUP_MODEL_NAME and TRUEUP_OPENAI_BASE_URL.",
    413: "Send a shorter text.",
    429: "Try again later, or raise the limit with the provider.",
}


class PayingClient(httpx2.Client):
    """An HTTP client that keeps the SDK from repeating a request that may have been served.

    The SDK repeats every failure of its client except errors of its own kind. Repeated and served twice, a request
    would be billed twice and charged once.

    It also reads every body as UTF-8, which JSON is: of the charsets a server may name, some are no text encodings to
    Python, and reading an answer would fail after it was paid.
    """

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = super().send(request, **options)
        except httpx2.RequestError as error:
            if isinstance(error, _NEVER_SENT):
                raise
            kind = openai.APITimeoutError if isinstance(error, httpx2.TimeoutException) else openai.APIConnectionError
            raise kind(request=request) from error
        response.encoding = "utf-8"
        return response

    def __del__(self) -> None:  # as the SDK's own client does
        with suppress(Exception):
            self.close()


class Failures:
    """Makes the errors of one server."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._key = key

    def of(self, error: Exception) -> ProviderError:
        """Translate what the SDK raised instead of an answer, or instead of the beginning of a stream."""
        if isinstance(error, openai.APIStatusError):
            return self._refused(error)
        if not isinstance(error, openai.APIConnectionError | httpx2.HTTPError):
            return ProviderError(f"The model at {self._url} could not be called: {self._safe(str(error))}.")
        cause = error.__cause__ or error
        if isinstance(cause, _NEVER_SENT):
            return ProviderError(
                f"The model at {self._url} can't be reached ({self._named(cause)}). "
                "Check the network and TRUEUP_OPENAI_BASE_URL.",
                retryable=True,
            )
        if isinstance(cause, httpx2.TimeoutException):
            return ProviderError(
                f"The model at {self._url} did not answer in time, so its usage is not known. The call may succeed "
                "later; raise TRUEUP_MODEL_TIMEOUT_SECONDS if it is often slow.",
                retryable=True,
                outcome_unknown=True,
            )
        return ProviderError(
            f"The connection to the model at {self._url} broke ({self._named(cause)}) before its answer was there, so "
            "its usage is not known. The call may succeed later.",
            retryable=True,
            outcome_unknown=True,
        )

    def no_completion(self, text: str) -> ProviderError:
        """Return the error of a success that is no completion: no usage can be read from it."""
        return ProviderError(
            f"The server at {self._url} answered with something that is no chat completion "
            f"({self._safe(text) or 'an empty body'}), so its usage is not known. Check TRUEUP_OPENAI_BASE_URL.",
            outcome_unknown=True,
        )

    def broken_stream(self, error: Exception | None, *, begun: bool) -> ProviderError:
        """Return the error of a stream that ended before its answer did. `error` None: it just stopped.

        `begun`: a part of the answer has arrived, by which the usage can be counted.
        """
        named = "the connection was closed" if error is None else self._named(error.__cause__ or error)
        usage = "What had arrived is counted" if begun else "Nothing had arrived, so its usage is not known"
        return ProviderError(
            f"The model at {self._url} broke off its answer ({named}). {usage}. The call may succeed later.",
            retryable=not isinstance(error, openai.APIError) or _worth_repeating(error),
            outcome_unknown=not begun,
        )

    def _refused(self, error: openai.APIStatusError) -> ProviderError:
        status = error.status_code
        # A 401 quotes the key, masked more or less: its text is left out altogether.
        detail = "" if status == 401 else f" ({self._safe(_refusal_text(error))})"
        retryable = _worth_repeating(error)
        remedy = _REMEDIES.get(status, "Try again later." if retryable else "See the provider's documentation.")
        if error.code == "insufficient_quota":
            remedy = "The account with the provider has no credit: add some."
        return ProviderError(
            f"The model at {self._url} refused the call with HTTP {status}{detail}. {remedy}",
            retryable=retryable,
        )

    def _named(self, error: BaseException) -> str:
        return self._safe(str(error)) or type(error).__name__

    def _safe(self, text: str) -> str:
        """Return a short line of somebody else's text, without the key."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "***")
        return cut_at_word(line, _DETAIL_CHARACTERS)


def _refusal_text(error: openai.APIStatusError) -> str:
    """Return what the server said, as far as it can be read."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return error.response.text


def _worth_repeating(error: openai.APIError) -> bool:
    """Say whether the same request may succeed later. An error in a stream has no status, but may name one."""
    if error.code == "insufficient_quota":
        return False
    status = getattr(error, "status_code", None)
    if status is None and error.code is not None and error.code.isdecimal():
        status = int(error.code)
    if status is None:
        return error.type != "invalid_request_error"
    return status in _RETRYABLE_STATUS or status >= 500
