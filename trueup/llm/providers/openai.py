"""OpenAI's SDK as a source of completions, from OpenAI or from any server with its chat completions API."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import httpx2
import openai

from trueup.llm.formats.reading import object_of, parsed
from trueup.llm.model import Message
from trueup.llm.providers.chat_format import ChatAnswers, chat_messages
from trueup.llm.providers.maker import BrokenAnswerError, NotAnAnswerError, Part
from trueup.llm.providers.paying_client import PayingClient
from trueup.llm.transport.refusals import restored
from trueup.settings.settings import Settings

if TYPE_CHECKING:
    from openai._legacy_response import LegacyAPIResponse
    from openai.types.chat import ChatCompletionMessageParam


class OpenAI(ChatAnswers):
    """Implements `Maker`."""

    url = "https://api.openai.com/v1"
    url_setting = "openai_base_url"
    root: type[Exception] | None = openai.OpenAIError
    errors: tuple[type[Exception], ...] = (openai.OpenAIError,)
    connection_errors: tuple[type[Exception], ...] = (openai.APIConnectionError,)

    def __init__(self, url: str, key: str, settings: Settings, http: PayingClient) -> None:
        self._model_name = settings.model_name
        self._cap_parameter = settings.model_max_tokens_parameter
        self._client = openai.OpenAI(
            api_key=key,
            base_url=url,
            timeout=settings.model_timeout_seconds,
            max_retries=settings.model_max_retries,
            http_client=http,
        )

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        return _completion_in(self._post(messages, cap).text)

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        with self._post(messages, cap, stream=True).parse(to=openai.Stream[object]) as events:
            response = events.response
            media_type = response.headers.get("content-type", "").lower()
            try:
                with restored():
                    if "json" in media_type or "html" in media_type:  # a whole completion, or some other page
                        response.read()
                        yield _completion_in(response.text)
                    else:
                        yield from map(object_of, events)
            except (openai.OpenAIError, httpx2.HTTPError) as error:
                raise BrokenAnswerError(error) from error

    def _post(self, messages: Sequence[Message], cap: int, *, stream: bool = False) -> "LegacyAPIResponse[Any]":
        """Return the raw response. The transport asks a stream for its usage."""
        legacy = self._cap_parameter == "max_tokens"
        return self._client.chat.completions.with_raw_response.create(
            model=self._model_name,
            messages=cast("list[ChatCompletionMessageParam]", chat_messages(messages)),
            max_tokens=cap if legacy else openai.omit,
            max_completion_tokens=openai.omit if legacy else cap,
            stream=stream,
        )


def _completion_in(text: str) -> Part:
    body = object_of(parsed(text))
    if not body.keys() & {"choices", "usage"}:
        raise NotAnAnswerError(text)
    return body
