"""Errors of a model's server, translated to `ProviderError` in one place and without the key."""

from typing import Any

import httpx2

from trueup.errors import ProviderError
from trueup.llm.outcomes import may_be_billed, never_sent
from trueup.llm.texts import cut_at_word

_RETRYABLE_STATUS = frozenset({408, 409, 429})
_DETAIL_CHARACTERS = 300

_REMEDIES = {
    400: "Check TRUEUP_MODEL_NAME and TRUEUP_MODEL_MAX_TOKENS_PARAMETER.",
    401: "Check {key}.",
    403: "Check that the key of {key} may use this model.",
    404: "Check TRUEUP_MODEL_NAME and {url}.",
    413: "Send a shorter text.",
    429: "Try again later, or raise the limit with the provider.",
}


class Failures:
    """Makes the errors of one server.

    `key_name`, `url_name`: the settings that hold its key and its URL. `connection_errors`: the SDK's errors around an
    error of its HTTP client.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        key_name: str,
        url_name: str,
        connection_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._url = url
        self._key = key
        self._names = {"key": key_name, "url": url_name}
        self._connection_errors = connection_errors

    def is_of_connection(self, error: Exception) -> bool:
        """Return whether the error came from the connection: from the HTTP client, or around one of its errors."""
        return isinstance(error, self._connection_errors) or isinstance(_cause_of(error), httpx2.HTTPError)

    def of(self, error: Exception) -> ProviderError:
        """Translate an error that the SDK raised before an answer, or before the first event of a stream."""
        status = status_of(error)
        if status is not None:
            return self._refused(error, status)
        if not self.is_of_connection(error):
            return ProviderError(f"The SDK could not call the model at {self._url}: {self._safe(str(error))}.")
        cause = _cause_of(error)
        if isinstance(cause, never_sent(httpx2)):
            return ProviderError(
                f"The model at {self._url} can't be reached ({self._named(cause)}). "
                f"Check the network and {self._names['url']}.",
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
            f"({self._safe(text) or 'an empty body'}), so the call's usage is unknown. Check {self._names['url']}.",
            outcome_unknown=True,
        )

    def broken_stream(self, error: Exception | None, *, begun: bool) -> ProviderError:
        """Return the error for a stream that ended before its answer did. `error` None: the server just stopped.

        `begun`: a part of the answer has arrived, so the usage can be counted.
        """
        named = "the connection was closed" if error is None else self._named(_cause_of(error))
        usage = "The received part is charged" if begun else "Nothing had arrived, so the call's usage is unknown"
        return ProviderError(
            f"The model at {self._url} broke off its answer ({named}). {usage}. A later call may succeed.",
            retryable=error is None or self.is_of_connection(error) or _worth_repeating(error),
            outcome_unknown=not begun,
        )

    def _refused(self, error: Exception, status: int) -> ProviderError:
        # The text of a 401 may quote part of the key, so it is left out.
        detail = "" if status == 401 else f" ({self._safe(_refusal_text(error))})"
        if may_be_billed(status):
            return ProviderError(
                f"The model at {self._url} failed with HTTP {status}{detail}, so the call's usage is unknown. A later "
                "call may succeed.",
                retryable=True,
                outcome_unknown=True,
            )
        retryable = _worth_repeating(error)
        remedy = _REMEDIES.get(status, "Try again later." if retryable else "See the provider's documentation.")
        if getattr(error, "code", None) == "insufficient_quota":
            remedy = "The provider's account has no credit. Add credit."
        return ProviderError(
            f"The model at {self._url} refused the call with HTTP {status}{detail}. {remedy.format(**self._names)}",
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


def _cause_of(error: Exception) -> BaseException:
    """Return the HTTP client's error that the SDK's error is about, or the error itself."""
    return error if isinstance(error, httpx2.HTTPError) else error.__cause__ or error


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of a refusal; None for any other error, such as an error event of a stream.

    Google's SDK calls it a code.
    """
    for status in (getattr(error, "status_code", None), getattr(error, "code", None)):
        if isinstance(status, int) and status >= 400:
            return status
    return None


def _refusal_text(error: Any) -> str:
    """Return the server's message, or the raw body if it has none."""
    body = getattr(error, "body", None)
    inner = body.get("error") if isinstance(body, dict) else None
    for fields in (inner, body):
        if isinstance(fields, dict) and isinstance(fields.get("message"), str):
            return str(fields["message"])
    return str(error.response.text) if hasattr(error, "body") else str(error.message)


def _worth_repeating(error: Exception) -> bool:
    """Return whether the same request may succeed later. An error event has no HTTP status; its code may be one."""
    code = getattr(error, "code", None)
    if code == "insufficient_quota":
        return False
    status = status_of(error)
    if status is None and isinstance(code, str) and code.isdecimal():
        status = int(code)
    if status is None:
        return getattr(error, "type", None) != "invalid_request_error"
    return status in _RETRYABLE_STATUS or status >= 500
