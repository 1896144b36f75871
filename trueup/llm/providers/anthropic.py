"""Anthropic's SDK as a source of completions."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import anthropic

from trueup.llm.formats.anthropic_messages import MessagesReader
from trueup.llm.formats.reading import list_of, object_of
from trueup.llm.formats.wire_format import AnswerReader
from trueup.llm.model import Message
from trueup.llm.providers.maker import Part, system_and_rest
from trueup.llm.providers.paying_client import PayingClient
from trueup.settings.settings import Settings


class Anthropic:
    """Implements `Maker`."""

    url = "https://api.anthropic.com"
    url_setting = "model_base_url"
    root: type[Exception] | None = anthropic.AnthropicError
    errors: tuple[type[Exception], ...] = (anthropic.AnthropicError,)
    connection_errors: tuple[type[Exception], ...] = (anthropic.APIConnectionError,)

    def __init__(self, url: str, key: str, settings: Settings, http: PayingClient) -> None:
        self._model_name = settings.model_name
        self._client = anthropic.Anthropic(
            api_key=key,
            base_url=url,
            timeout=settings.model_timeout_seconds,
            max_retries=settings.model_max_retries,
            http_client=http,
        )
        self._client.auth_token = None  # of a variable of the SDK's

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        # The raw answer: the SDK's object has every field, whatever the server has sent.
        response = self._client.messages.with_raw_response.create(**self._request(messages, cap))
        return object_of(json.loads(response.http_response.text))

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        with self._client.messages.create(**self._request(messages, cap), stream=True) as events:
            for event in events:
                yield event.model_dump(mode="json", exclude_unset=True, warnings=False)

    def reader(self) -> AnswerReader:
        return MessagesReader()

    def text_of(self, part: Part) -> str:
        if part.get("type") == "content_block_delta":
            return str(object_of(part.get("delta")).get("text") or "")
        blocks = [object_of(block) for block in list_of(part.get("content"))]
        return "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")

    def is_cut(self, part: Part) -> bool:
        return "max_tokens" in (part.get("stop_reason"), object_of(part.get("delta")).get("stop_reason"))

    def _request(self, messages: Sequence[Message], cap: int) -> Any:
        system, rest = system_and_rest(messages)
        asked = [{"role": message.role, "content": message.content} for message in rest]
        more = {"system": system} if system else {}
        return {"model": self._model_name, "max_tokens": cap, "messages": asked} | more
