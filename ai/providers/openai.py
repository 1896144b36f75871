"""Completions from OpenAI, or from any server that speaks its chat completions API."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import openai

from ai.credentials import header_value
from ai.model import Completion, Message
from ai.providers.openai_answers import read_answer
from ai.texts import cut_at_word, without_lone_surrogates
from ai.tokens import count_prompt_tokens, counter_for
from billing.errors import ProviderError, SettingsError
from billing.settings import Settings

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

# Named here, so that OPENAI_BASE_URL in the environment can't send the key elsewhere.
_OPENAI_URL = "https://api.openai.com/v1"
_NO_KEY = "none"  # local servers ask for no key, the SDK insists on one
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


class OpenAIProvider:
    """A provider behind the official SDK. One instance per process: it keeps connections open."""

    def __init__(self, settings: Settings) -> None:
        """Connects to nothing yet. Raises `SettingsError` when OpenAI itself is meant and no key is set."""
        key = header_value("TRUEUP_OPENAI_API_KEY", settings.openai_api_key)
        if not key and not settings.openai_base_url:
            raise SettingsError(
                "TRUEUP_OPENAI_API_KEY is not set, so OpenAI would refuse every call. Set it; or set "
                "TRUEUP_OPENAI_BASE_URL for a server that needs no key; or TRUEUP_MODEL_PROVIDER=offline."
            )
        self._key = key
        self._url = settings.openai_base_url or _OPENAI_URL
        self._model_name = settings.model_name
        self._cap_parameter = settings.model_max_tokens_parameter
        self._counter = counter_for(settings.model_name)
        self._client = openai.OpenAI(
            api_key=key or _NO_KEY,
            base_url=self._url,
            timeout=settings.model_timeout_seconds,
            max_retries=settings.model_max_retries,
        )

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return the tokens the prompt costs, message overhead included; never fewer than billed."""
        return count_prompt_tokens(messages, self._counter)

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        """Buy one completion of at most `max_completion_tokens` tokens. Raises `ProviderError`.

        An answer without text still returns its usage, so that it is charged.
        """
        started = time.monotonic()
        body = self._post(messages, max_completion_tokens)
        answer = read_answer(body)
        usage = answer.usage or self._counted(messages, answer.text, max_completion_tokens)
        return Completion(
            text=answer.text,
            prompt_tokens=usage[0],
            completion_tokens=usage[1],
            total_tokens=usage[2],
            model_name=answer.model_name or self._model_name,
            response_time_ms=round((time.monotonic() - started) * 1000),
            truncated=answer.truncated,
            usage_reported=answer.usage is not None,
        )

    def _post(self, messages: Sequence[Message], cap: int) -> dict[str, Any]:
        legacy = self._cap_parameter == "max_tokens"
        try:
            # The raw response: the SDK's types are not validated, and usage that can't be trusted must be seen.
            response = self._client.chat.completions.with_raw_response.create(
                model=self._model_name,
                messages=_parameters(messages),
                max_tokens=cap if legacy else openai.omit,
                max_completion_tokens=openai.omit if legacy else cap,
            )
            text = response.text
        except openai.APIStatusError as error:
            raise self._status_error(error) from None  # the SDK's text may quote part of the key
        except openai.APITimeoutError:
            raise ProviderError(
                f"The model at {self._url} did not answer in time. The call may succeed later; "
                "raise TRUEUP_MODEL_TIMEOUT_SECONDS if it is often slow.",
                retryable=True,
            ) from None
        except openai.APIConnectionError as error:
            raise ProviderError(
                f"The model at {self._url} can't be reached ({self._safe(str(error.__cause__ or error))}). "
                "Check the network and TRUEUP_OPENAI_BASE_URL.",
                retryable=True,
            ) from None
        except openai.OpenAIError as error:
            raise ProviderError(f"The model at {self._url} could not be called: {self._safe(str(error))}.") from None
        return self._object(text)

    def _object(self, text: str) -> dict[str, Any]:
        """Read the body of a success. No usage can be read from one that is no completion, so none is charged."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = None
        if isinstance(body, dict) and ("choices" in body or "usage" in body):
            return body
        raise ProviderError(
            f"The server at {self._url} answered with something that is no chat completion "
            f"({self._safe(text) or 'an empty body'}). Check TRUEUP_OPENAI_BASE_URL."
        )

    def _status_error(self, error: openai.APIStatusError) -> ProviderError:
        status = error.status_code
        out_of_credit = status == 429 and error.code == "insufficient_quota"
        retryable = (status in _RETRYABLE_STATUS or status >= 500) and not out_of_credit
        # A 401 quotes the key, masked more or less: its text is left out altogether.
        detail = "" if status == 401 else f" ({self._safe(_detail(error))})"
        remedy = _REMEDIES.get(status, "Try again later." if retryable else "See the provider's documentation.")
        if out_of_credit:
            remedy = "The account with the provider has no credit: add some."
        return ProviderError(
            f"The model at {self._url} refused the call with HTTP {status}{detail}. {remedy}",
            retryable=retryable,
        )

    def _safe(self, text: str) -> str:
        """Return a short line of somebody else's text, without the key."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "***")
        return cut_at_word(line, _DETAIL_CHARACTERS)

    def _counted(self, messages: Sequence[Message], text: str, cap: int) -> tuple[int, int, int]:
        """Count what the provider did not name. A bound is no more than the cap that the provider was given."""
        prompt = self.count_prompt_tokens(messages)
        completion = self._counter.count(text)
        if not self._counter.exact:
            completion = min(completion, cap)
        return prompt, completion, prompt + completion


def _detail(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return error.response.text


def _parameters(messages: Sequence[Message]) -> "list[ChatCompletionMessageParam]":
    return [
        cast(
            "ChatCompletionMessageParam",
            {"role": message.role, "content": without_lone_surrogates(message.content)},
        )
        for message in messages
    ]
