"""OpenAI's SDK as a source of completions, from OpenAI or from any server with its chat completions API."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import httpx2
import openai

from trueup.llm.formats.openai_chat import ChatReader
from trueup.llm.formats.reading import list_of, object_of, parsed
from trueup.llm.formats.wire_format import AnswerReader
from trueup.llm.model import Message
from trueup.llm.providers.maker import BrokenAnswerError, NotAnAnswerError, Part
from trueup.llm.providers.paying_client import PayingClient
from trueup.llm.texts import without_lone_surrogates
from trueup.settings.settings import Settings

if TYPE_CHECKING:
    from openai._legacy_response import LegacyAPIResponse
    from openai.types.chat import ChatCompletionMessageParam


class OpenAI:
    """Implements `Maker`."""

    url = "https://api.openai.com/v1"
    url_setting = "openai_base_url"
    errors: tuple[type[Exception], ...] = (openai.OpenAIError,)
    connection_errors: tuple[type[Exception], ...] = (openai.APIConnectionError,)

    def __init__(self, url: str, key: str, settings: Settings) -> None:
        self._model_name = settings.model_name
        self._cap_parameter = settings.model_max_tokens_parameter
        self._asks_for_usage = True
        self._client = openai.OpenAI(
            api_key=key,
            base_url=url,
            timeout=settings.model_timeout_seconds,
            max_retries=settings.model_max_retries,
            http_client=PayingClient(
                root=openai.OpenAIError,
                answer_seconds=settings.model_timeout_seconds,
                limits=openai.DEFAULT_CONNECTION_LIMITS,
            ),
        )

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        return _completion_in(self._post(messages, cap).text)

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        with self._open(messages, cap) as events:
            response = events.response
            media_type = response.headers.get("content-type", "").lower()
            try:
                if "json" in media_type or "html" in media_type:  # a whole completion, or some other page
                    response.read()
                    yield _completion_in(response.text)
                else:
                    yield from map(object_of, events)
            except (openai.OpenAIError, httpx2.HTTPError) as error:
                raise BrokenAnswerError(error) from error

    def reader(self, *, is_stream: bool) -> AnswerReader:
        return ChatReader()

    def text_of(self, part: Part) -> str:
        choice = _first_choice(part)
        message = object_of(choice.get("delta")) or object_of(choice.get("message"))
        content = message.get("content") if message else choice.get("text")
        if isinstance(content, str):
            return content
        texts = [object_of(piece).get("text") for piece in list_of(content)]
        return "".join(text for text in texts if isinstance(text, str))

    def is_cut(self, part: Part) -> bool:
        return bool(_first_choice(part).get("finish_reason") == "length")

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
        asked = [{"role": message.role, "content": without_lone_surrogates(message.content)} for message in messages]
        return self._client.chat.completions.with_raw_response.create(
            model=self._model_name,
            messages=cast("list[ChatCompletionMessageParam]", asked),
            max_tokens=cap if legacy else openai.omit,
            max_completion_tokens=openai.omit if legacy else cap,
            stream=stream,
            stream_options={"include_usage": True} if usage else openai.omit,
        )


def _may_refuse_the_option(error: openai.APIStatusError) -> bool:
    """Return whether a refusal, which is free, may concern `stream_options`: it names the option or no parameter."""
    if error.status_code not in (400, 422):
        return False
    return "stream_options" in error.response.text or not (error.code or error.param)


def _completion_in(text: str) -> Part:
    body = object_of(parsed(text))
    if not body.keys() & {"choices", "usage"}:
        raise NotAnAnswerError(text)
    return body


def _first_choice(part: Part) -> dict[str, Any]:
    return object_of(next(iter(list_of(part.get("choices"))), None))
