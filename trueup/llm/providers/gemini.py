"""Google's SDK as a source of completions."""

from collections.abc import Iterator, Sequence
from typing import Any

from google import genai
from google.genai import errors, types

from trueup.llm.formats.gemini import GeminiReader
from trueup.llm.formats.reading import list_of, object_of
from trueup.llm.formats.wire_format import AnswerReader
from trueup.llm.model import Message
from trueup.llm.providers.maker import Part, system_and_rest
from trueup.llm.providers.paying_client import PayingClient
from trueup.settings.settings import Settings


class Gemini:
    """Implements `Maker`. The SDK makes one attempt for each call, so `model_max_retries` has no effect."""

    url = "https://generativelanguage.googleapis.com"
    url_setting = "model_base_url"
    root: type[Exception] | None = None
    errors: tuple[type[Exception], ...] = (errors.APIError,)
    connection_errors: tuple[type[Exception], ...] = ()

    def __init__(self, url: str, key: str, settings: Settings, http: PayingClient) -> None:
        self._model_name = settings.model_name
        self._http = http
        options = types.HttpOptions(
            base_url=url, httpx_client=http, timeout=round(settings.model_timeout_seconds * 1000)
        )
        self._client = genai.Client(api_key=key, vertexai=False, http_options=options)

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        return _plain(self._client.models.generate_content(**self._request(messages, cap)))

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        chunks = self._client.models.generate_content_stream(**self._request(messages, cap))
        first = next(chunks, None)
        response = self._http.latest_response
        try:
            while first is not None:
                yield _plain(first)
                first = next(chunks, None)
        finally:
            response.close()  # the SDK leaves it open

    def reader(self) -> AnswerReader:
        return GeminiReader(is_stream=True)

    def text_of(self, part: Part) -> str:
        contents = [object_of(object_of(one).get("content")) for one in list_of(part.get("candidates"))[:1]]
        pieces = [object_of(piece) for content in contents for piece in list_of(content.get("parts"))]
        return "".join(str(piece.get("text") or "") for piece in pieces if not piece.get("thought"))

    def is_cut(self, part: Part) -> bool:
        return any(object_of(one).get("finishReason") == "MAX_TOKENS" for one in list_of(part.get("candidates")))

    def _request(self, messages: Sequence[Message], cap: int) -> Any:
        system, rest = system_and_rest(messages)
        roles = {"assistant": "model", "user": "user"}
        contents = [
            types.Content(role=roles[message.role], parts=[types.Part(text=message.content)]) for message in rest
        ]
        config = types.GenerateContentConfig(max_output_tokens=cap, system_instruction=system or None)
        return {"model": self._model_name, "contents": contents, "config": config}


def _plain(answer: types.GenerateContentResponse) -> Part:
    """Return the SDK's object as the server's JSON."""
    return answer.model_dump(mode="json", by_alias=True, exclude_none=True, warnings=False)
