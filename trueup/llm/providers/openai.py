"""Completions from OpenAI, or from any server with its chat completions API."""

import time
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import openai

from trueup.errors import SettingsError
from trueup.llm.bounds import assigned_counter
from trueup.llm.credentials import header_value
from trueup.llm.model import Completion, CompletionStream, Message
from trueup.llm.providers.failures import Failures
from trueup.llm.providers.openai_answers import Answer
from trueup.llm.providers.openai_streams import SDK_ERRORS, StreamReader, completion_body
from trueup.llm.providers.paying_client import PayingClient
from trueup.llm.texts import without_lone_surrogates
from trueup.llm.tokens import count_prompt_tokens, counter_for
from trueup.settings.model_keys import model_key
from trueup.settings.settings import Settings

if TYPE_CHECKING:
    from openai._legacy_response import LegacyAPIResponse
    from openai.types.chat import ChatCompletionMessageParam

# Always passed to the SDK, so that OPENAI_BASE_URL in the environment can't send the key to another server.
_OPENAI_URL = "https://api.openai.com/v1"
_NO_KEY = "none"  # for local servers without keys; the SDK requires one


class OpenAIProvider:
    """A provider that uses the official SDK. Make one per process, because it keeps connections open."""

    def __init__(self, settings: Settings) -> None:
        """Make the client without connecting. Raises `SettingsError` if no key is set and the server is OpenAI's."""
        key_name, secret = model_key(settings)
        key = header_value(key_name, secret)
        if not key and not settings.openai_base_url:
            raise SettingsError(
                f"{key_name} is not set, and OpenAI refuses calls without a key. Nothing was spent. Set it, "
                "or set TRUEUP_OPENAI_BASE_URL for a server that needs no key, or TRUEUP_MODEL_PROVIDER=offline."
            )
        url = settings.openai_base_url or _OPENAI_URL
        self._failures = Failures(
            url,
            key,
            key_name=key_name,
            url_name="TRUEUP_OPENAI_BASE_URL",
            connection_errors=(openai.APIConnectionError,),
        )
        self._model_name = settings.model_name
        self._cap_parameter = settings.model_max_tokens_parameter
        self._counter = assigned_counter(settings.model_name, settings) or counter_for(settings.model_name)
        self._asks_for_usage = True
        self._client = openai.OpenAI(
            api_key=key or _NO_KEY,
            base_url=url,
            timeout=settings.model_timeout_seconds,
            max_retries=settings.model_max_retries,
            http_client=PayingClient(
                root=openai.OpenAIError,
                answer_seconds=settings.model_timeout_seconds,
                limits=openai.DEFAULT_CONNECTION_LIMITS,
            ),
        )

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return the tokens that the prompt costs, with message overhead; never fewer than billed."""
        return count_prompt_tokens(messages, self._counter)

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int) -> Completion:
        """Buy one completion of at most `max_completion_tokens` tokens. Raises `ProviderError`.

        An answer without text still returns its usage, so that it is charged.
        """
        started = time.monotonic()
        try:
            text = self._post(messages, max_completion_tokens).text
        except SDK_ERRORS as error:
            raise self._failures.of(error) from None  # the SDK's text may quote part of the key
        answer = Answer()
        answer.add(completion_body(text, self._failures))
        return self._completion(answer, messages, max_completion_tokens, time.monotonic() - started)

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int) -> CompletionStream:
        """Buy one completion of at most `max_completion_tokens` tokens, in chunks. Returns once it has begun.

        The usage is the provider's if it was reported with or after the last text; otherwise it is counted.
        Raises `ProviderError` if the stream does not begin; iterating raises it if the stream breaks.
        """
        started = time.monotonic()
        try:
            events = self._open(messages, max_completion_tokens)
        except SDK_ERRORS as error:
            raise self._failures.of(error) from None
        reader = StreamReader(events, self._failures)
        chunks = reader.chunks()
        first = next(chunks)

        def finish() -> Completion:
            reader.close()
            seconds = reader.last_arrival - started
            return self._completion(reader.answer, messages, max_completion_tokens, seconds)

        return CompletionStream(chain((first,), chunks), finish)

    def _open(self, messages: Sequence[Message], cap: int) -> "openai.Stream[object]":
        """Open a stream that reports its usage at the end, or one without if the server does not know the option."""
        if self._asks_for_usage:
            try:
                return self._post(messages, cap, stream=True, usage=True).parse(to=openai.Stream[object])
            except openai.APIStatusError as error:
                if not _may_refuse_the_option(error):
                    raise
        events = self._post(messages, cap, stream=True).parse(to=openai.Stream[object])
        self._asks_for_usage = False
        return events

    def _post(
        self, messages: Sequence[Message], cap: int, *, stream: bool = False, usage: bool = False
    ) -> "LegacyAPIResponse[Any]":
        """Return the raw response. The SDK does not validate its types, so the usage must be checked here."""
        legacy = self._cap_parameter == "max_tokens"
        return self._client.chat.completions.with_raw_response.create(
            model=self._model_name,
            messages=_parameters(messages),
            max_tokens=cap if legacy else openai.omit,
            max_completion_tokens=openai.omit if legacy else cap,
            stream=stream,
            stream_options={"include_usage": True} if usage else openai.omit,
        )

    def _completion(self, answer: Answer, messages: Sequence[Message], cap: int, seconds: float) -> Completion:
        text = answer.text
        usage = answer.usage or self._counted(messages, text, answer.reasoning, cap)
        return Completion(
            text=text,
            prompt_tokens=usage[0],
            completion_tokens=usage[1],
            total_tokens=usage[2],
            model_name=answer.model_name or self._model_name,
            response_time_ms=round(seconds * 1000),
            truncated=answer.truncated,
            usage_reported=answer.usage is not None,
        )

    def _counted(self, messages: Sequence[Message], text: str, reasoning: str, cap: int) -> tuple[int, int, int]:
        """Count the usage that the provider did not report: at most the requested maximum."""
        prompt = self.count_prompt_tokens(messages)
        completion = min(self._counter.count(text) + self._counter.count(reasoning), cap)
        return prompt, completion, prompt + completion


def _may_refuse_the_option(error: openai.APIStatusError) -> bool:
    """Return whether a refusal, which is free, may concern `stream_options`: it names the option or no parameter."""
    if error.status_code not in (400, 422):
        return False
    return "stream_options" in error.response.text or not (error.code or error.param)


def _parameters(messages: Sequence[Message]) -> "list[ChatCompletionMessageParam]":
    return [
        cast(
            "ChatCompletionMessageParam",
            {"role": message.role, "content": without_lone_surrogates(message.content)},
        )
        for message in messages
    ]
