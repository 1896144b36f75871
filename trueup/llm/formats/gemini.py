"""Gemini: generateContent, streamGenerateContent, embedContent and batchEmbedContents."""

import re
from typing import Any

from trueup.llm.formats.prompts import Unknown, bounded_prompt
from trueup.llm.formats.reader import Reader
from trueup.llm.formats.reading import count_of, list_of, object_of, requested_count, strings_in
from trueup.llm.formats.usage import TokenUsage, split_usage
from trueup.llm.formats.wire_format import AnswerReader, Body, Count, Sent
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import TokenCounter

_MODEL = re.compile(r"/models/([^/:]+):")
_CONFIG = ("generationConfig", "generation_config")
_CAP = ("maxOutputTokens", "max_output_tokens")
_MEDIA = ("inlineData", "inline_data", "fileData", "file_data")
_DECLARED = frozenset(("functionDeclarations", "function_declarations"))
_MARKS = frozenset(("thoughtSignature", "thought_signature", "mimeType", "role", "id"))


class GenerateContent:
    """POST …/models/M:generateContent and …:streamGenerateContent"""

    name = "gemini generateContent"

    def model_of(self, sent: Sent) -> str:
        return _model_in(sent.path)

    def is_stream(self, sent: Sent) -> bool:
        return sent.path.endswith(":streamgeneratecontent")

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        config = _config(sent.body)
        thinking = object_of(_either(config, "thinkingConfig", "thinking_config"))
        budget = requested_count(thinking, "thinkingBudget", "thinking_budget", least=0)
        return Demand(
            prompt_tokens=_prompt_tokens(sent, counter),
            wanted=requested_count(config, *_CAP),
            choices=requested_count(config, "candidateCount", "candidate_count") or 1,
            # Whether the cap covers thoughts depends on the model. A budget of -1 lets the model choose within the cap.
            beside=budget or 0,
        )

    def count_request(self, sent: Sent) -> Count | None:
        content = sent.body | {"model": f"models/{_model_in(sent.path)}"}
        return Count(ending=":countTokens", body={"generateContentRequest": content}, answer="totalTokens")

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        config = _config(sent.body)
        wanted = requested_count(config, *_CAP)
        if wanted is not None and wanted <= limit:
            return sent.body
        name = next((name for name in _CONFIG if name in sent.body), _CONFIG[0])
        cap = next((cap for cap in _CAP if cap in config), _CAP[0])
        return sent.body | {name: config | {cap: limit}}

    def adds_usage(self, sent: Sent) -> bool:
        return False

    def reader(self, sent: Sent) -> AnswerReader:
        return GeminiReader(is_stream=self.is_stream(sent))


class EmbedContent:
    """POST …/models/M:embedContent and …:batchEmbedContents"""

    name = "gemini embedContent"

    def model_of(self, sent: Sent) -> str:
        return _model_in(sent.path)

    def is_stream(self, sent: Sent) -> bool:
        return False

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        requests = list_of(sent.body.get("requests")) or [sent.body]
        contents = [object_of(request).get("content") for request in requests]
        messages = [_as_message(content) for content in contents]
        return Demand(prompt_tokens=bounded_prompt(sent, counter, messages, {}, _media_in(contents)), choices=0)

    def count_request(self, sent: Sent) -> Count | None:
        return None

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        return sent.body

    def adds_usage(self, sent: Sent) -> bool:
        return False

    def reader(self, sent: Sent) -> AnswerReader:
        return GeminiReader(is_stream=False)


def _model_in(path: str) -> str:
    found = _MODEL.search(path)
    return found.group(1) if found else ""


def _either(fields: dict[str, Any], *names: str) -> Any:
    """Return the first of these fields that is there: the API takes two spellings of each name."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _config(body: Body) -> dict[str, Any]:
    return object_of(_either(body, *_CONFIG))


def _contents(body: Body) -> list[Any]:
    contents = body.get("contents")
    return contents if isinstance(contents, list) else [contents]


def _prompt_tokens(sent: Sent, counter: TokenCounter) -> int:
    body = sent.body
    contents = _contents(body)
    config = _config(body)
    rest = {
        "system": _either(body, "systemInstruction", "system_instruction"),
        "tools": body.get("tools"),
        "schema": _either(config, "responseSchema", "response_schema", "responseJsonSchema", "response_json_schema"),
    }
    unknown = _media_in([*contents, rest["system"]])
    if _either(body, "cachedContent", "cached_content"):
        unknown = Unknown(what="a cached content that only the provider knows")
    for tool in list_of(body.get("tools")):
        hosted = set(object_of(tool)) - _DECLARED
        if hosted:
            unknown = Unknown(what=f"a tool {min(hosted)!r:.40} that the provider runs", is_countable=False)
    messages = [_as_message(content) for content in contents]
    return bounded_prompt(sent, counter, messages, {name: value for name, value in rest.items() if value}, unknown)


def _as_message(content: object) -> dict[str, Any]:
    """Return a content as the message whose tokens are counted: texts as texts, calls of tools as JSON."""
    fields = object_of(content)
    parts = [object_of(part) for part in list_of(fields.get("parts"))]
    calls = [{name: value for name, value in part.items() if name not in ("text", *_MEDIA, *_MARKS)} for part in parts]
    texts = [part.get("text") for part in parts]
    message: dict[str, Any] = {"role": fields.get("role") or "", "content": [text for text in texts if text]}
    return message | {"calls": [call for call in calls if call]}


def _media_in(contents: list[Any]) -> Unknown | None:
    for content in contents:
        for part in list_of(object_of(content).get("parts")):
            found = next((name for name in _MEDIA if name in object_of(part)), None)
            if found is not None:
                return Unknown(what=f"a part {found!r}")
    return None


class GeminiReader(Reader):
    """Reads an answer or the chunks of one. Each chunk reports the usage until then."""

    def __init__(self, *, is_stream: bool) -> None:
        super().__init__()
        self._is_finished = not is_stream

    def add(self, event: str | None, data: object) -> bool:
        body = object_of(data)
        candidates = [object_of(candidate) for candidate in list_of(body.get("candidates"))]
        self.has_begun |= any(name in body for name in ("candidates", "usageMetadata", "embeddings", "embedding"))
        self._note_model(body.get("modelVersion"))
        self._note_texts(text for one in candidates for text in strings_in(one.get("content"), without=_MARKS))
        self._is_finished |= any(bool(candidate.get("finishReason")) for candidate in candidates)
        self._is_finished |= bool(object_of(body.get("promptFeedback")).get("blockReason"))
        figures = object_of(body.get("usageMetadata"))
        if figures:
            self._usage = _usage(figures) or self._usage
            self.prompt_tokens = count_of(figures.get("promptTokenCount")) or self.prompt_tokens
        return False

    @property
    def usage(self) -> TokenUsage | None:
        return self._usage if self._is_finished else None

    def end(self) -> None:
        self.is_complete |= self._is_finished


def _usage(figures: dict[str, Any]) -> TokenUsage | None:
    """Return the usage. The prompt's count includes what a cache gave; the answer's count excludes thoughts."""
    names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "toolUsePromptTokenCount")
    counts = [count_of(figures.get(name) or 0) for name in names]
    if any(count is None for count in counts) or not counts[0]:
        return None
    prompt, answer, thoughts, tools = (count or 0 for count in counts)
    return split_usage(
        prompt=prompt + tools,
        completion=answer + thoughts,
        cached_input=count_of(figures.get("cachedContentTokenCount")) or 0,
        reasoning=thoughts,
        input_audio=_audio(figures.get("promptTokensDetails")),
        output_audio=_audio(figures.get("candidatesTokensDetails")),
    ).at_least(count_of(figures.get("totalTokenCount")))


def _audio(details: object) -> int:
    parts = [object_of(part) for part in list_of(details)]
    return sum(count_of(part.get("tokenCount")) or 0 for part in parts if part.get("modality") == "AUDIO")
