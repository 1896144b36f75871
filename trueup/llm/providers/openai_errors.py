"""Errors of an OpenAI-compatible server, translated to `ProviderError` in one place and without the key."""

import httpx2
import openai

from trueup.errors import ProviderError
from trueup.llm.providers.openai_client import NEVER_SENT
from trueup.llm.texts import cut_at_word

SDK_ERRORS = (openai.OpenAIError, httpx2.HTTPError)
"""The SDK's errors. While it reads the body of a refusal, its HTTP client's own errors get through."""

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


class Failures:
    """Makes the errors of one server."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._key = key

    def of(self, error: Exception) -> ProviderError:
        """Translate an error that the SDK raised before an answer, or before the first event of a stream."""
        if isinstance(error, openai.APIStatusError):
            return self._refused(error)
        if not isinstance(error, openai.APIConnectionError | httpx2.HTTPError):
            return ProviderError(f"The SDK could not call the model at {self._url}: {self._safe(str(error))}.")
        cause = error.__cause__ or error
        if isinstance(cause, NEVER_SENT):
            return ProviderError(
                f"The model at {self._url} can't be reached ({self._named(cause)}). "
                "Check the network and TRUEUP_OPENAI_BASE_URL.",
                retryable=True,
            )
        if isinstance(cause, httpx2.TimeoutException):
            return ProviderError(
                f"The model at {self._url} did not answer in time, so the call's usage is unknown. A later call may "
                "succeed. If the model is often slow, raise TRUEUP_MODEL_TIMEOUT_SECONDS.",
                retryable=True,
                outcome_unknown=True,
            )
        return ProviderError(
            f"The connection to the model at {self._url} broke ({self._named(cause)}) before its answer arrived, so "
            "the call's usage is unknown. A later call may succeed.",
            retryable=True,
            outcome_unknown=True,
        )

    def no_completion(self, text: str) -> ProviderError:
        """Return the error for a success that is not a completion and so has no usage."""
        return ProviderError(
            f"The server at {self._url} answered, but not with a chat completion "
            f"({self._safe(text) or 'an empty body'}), so the call's usage is unknown. Check TRUEUP_OPENAI_BASE_URL.",
            outcome_unknown=True,
        )

    def broken_stream(self, error: Exception | None, *, begun: bool) -> ProviderError:
        """Return the error for a stream that ended before its answer did. `error` None: the server just stopped.

        `begun`: a part of the answer has arrived, so the usage can be counted.
        """
        named = "the connection was closed" if error is None else self._named(error.__cause__ or error)
        usage = "The received part is charged" if begun else "Nothing had arrived, so the call's usage is unknown"
        return ProviderError(
            f"The model at {self._url} broke off its answer ({named}). {usage}. A later call may succeed.",
            retryable=not isinstance(error, openai.APIError) or _worth_repeating(error),
            outcome_unknown=not begun,
        )

    def _refused(self, error: openai.APIStatusError) -> ProviderError:
        status = error.status_code
        # The text of a 401 may quote part of the key, so it is left out.
        detail = "" if status == 401 else f" ({self._safe(_refusal_text(error))})"
        retryable = _worth_repeating(error)
        remedy = _REMEDIES.get(status, "Try again later." if retryable else "See the provider's documentation.")
        if error.code == "insufficient_quota":
            remedy = "The provider's account has no credit. Add credit."
        return ProviderError(
            f"The model at {self._url} refused the call with HTTP {status}{detail}. {remedy}",
            retryable=retryable,
        )

    def _named(self, error: BaseException) -> str:
        return self._safe(str(error)) or type(error).__name__

    def _safe(self, text: str) -> str:
        """Return one short line of the server's text, without the key."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "***")
        return cut_at_word(line, _DETAIL_CHARACTERS)


def _refusal_text(error: openai.APIStatusError) -> str:
    """Return the server's message, or the raw body if it has none."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return error.response.text


def _worth_repeating(error: openai.APIError) -> bool:
    """Return whether the same request may succeed later. An error event has no HTTP status; its code may be one."""
    if error.code == "insufficient_quota":
        return False
    status = getattr(error, "status_code", None)
    if status is None and error.code is not None and error.code.isdecimal():
        status = int(error.code)
    if status is None:
        return error.type != "invalid_request_error"
    return status in _RETRYABLE_STATUS or status >= 500
