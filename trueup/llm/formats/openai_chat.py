"""OpenAI Chat Completions, and the same format of any compatible server (vLLM, llama.cpp, Groq, Mistral, DeepSeek)."""

from typing import Any

from trueup.llm.formats.prompts import Unknown, bounded_prompt, media_in
from trueup.llm.formats.reader import Reader
from trueup.llm.formats.reading import (
    MAX_TOKENS,
    count_of,
    first_count,
    list_of,
    object_of,
    requested_count,
    strings_in,
)
from trueup.llm.formats.usage import TokenUsage, split_usage
from trueup.llm.formats.wire_format import AnswerReader, Body, BodyFormat, Count, Sent
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import TokenCounter

# llama.cpp takes all three. If several are given, the larger wins.
_CAPS = ("max_completion_tokens", "max_tokens", "n_predict")
_TEXT_PARTS = frozenset(("text", "refusal"))
# Fields that never become part of a prompt.
_SETTINGS = frozenset(
    (
        *("model", "messages", "stream", "stream_options", "user", "metadata", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "modalities", "reasoning_effort", "verbosity", "logit_bias", "audio", "stop"),
    )
)
# Strings in an answer that are not text of the model.
_MARKS = frozenset(("role", "id", "type", "index", "obfuscation", "finish_reason", "logprobs", "data", "expires_at"))


class ChatCompletions(BodyFormat):
    """POST …/chat/completions"""

    name = "openai chat"

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        caps = [cap for name in _CAPS if (cap := requested_count(sent.body, name)) is not None]
        return Demand(
            prompt_tokens=_prompt_tokens(sent, counter),
            wanted=max(caps) if caps else None,
            choices=requested_count(sent.body, "n") or 1,
        )

    def count_request(self, sent: Sent) -> Count | None:
        return None

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        body = _capped(sent, limit)
        if adds_usage:
            options = object_of(body.get("stream_options"))
            body = body | {"stream_options": options | {"include_usage": True}}
        return body

    def adds_usage(self, sent: Sent) -> bool:
        return self.is_stream(sent) and not object_of(sent.body.get("stream_options")).get("include_usage")

    def reader(self, sent: Sent) -> AnswerReader:
        return ChatReader()


def _capped(sent: Sent, limit: int) -> Body:
    given = [name for name in _CAPS if requested_count(sent.body, name) is not None]
    unlimited = [name for name in _CAPS if name not in given and sent.body.get(name) is not None]
    lowered = {name: limit for name in given if sent.body[name] > limit} | dict.fromkeys(unlimited, limit)
    if not given and not unlimited:
        lowered = {_own_cap(sent.host): limit}
    return sent.body | lowered if lowered else sent.body


def _own_cap(host: str) -> str:
    """Return the name of the cap that a server certainly takes. OpenAI's newer models refuse the older name."""
    is_openai = host == "api.openai.com" or host.endswith((".openai.com", ".openai.azure.com", ".azure.com"))
    return "max_completion_tokens" if is_openai else "max_tokens"


def _prompt_tokens(sent: Sent, counter: TokenCounter) -> int:
    messages = list_of(sent.body.get("messages"))
    unknown = media_in(messages, _TEXT_PARTS)
    if sent.body.get("web_search_options") is not None:
        unknown = Unknown(what="the results of a web search", is_countable=False)
    rest = {name: value for name, value in sent.body.items() if name not in _SETTINGS and _is_text(value)}
    return bounded_prompt(sent, counter, messages, rest, unknown)


def _is_text(value: object) -> bool:
    return isinstance(value, (str, list, dict)) and bool(value)


class ChatReader(Reader):
    """Reads a completion or the chunks of one."""

    def add(self, event: str | None, data: object) -> bool:
        if data == "[DONE]":
            self.is_complete = True
            return False
        body = object_of(data)
        self.has_begun |= "choices" in body or "usage" in body
        choices = [object_of(choice) for choice in list_of(body.get("choices"))]
        self._note_model(body.get("model"))
        if self._note_texts(part for choice in choices for part in _texts(choice)):
            self._usage = None  # it was reported before the answer's end
        self.is_complete |= any(isinstance(choice.get("message"), dict) for choice in choices)
        self._is_finished |= any(bool(choice.get("finish_reason")) for choice in choices)
        if body.get("usage") is None:  # as in most events of a stream
            return False
        usage = chat_usage(body["usage"], answered=bool(self.texts))
        self._usage = usage or self._usage
        # Usage without a choice, after a text, is a stream's last chunk, even if the server reports no finish reason.
        self._is_finished |= usage is not None and not choices and bool(self.texts)
        return not choices and "choices" in body

    def end(self) -> None:
        self.is_complete |= self._is_finished  # usage alone does not say so: a server may report it in each chunk


def _texts(choice: dict[str, Any]) -> list[str]:
    message = object_of(choice.get("delta")) or object_of(choice.get("message"))
    return list(strings_in(message or choice.get("text"), without=_MARKS))


def chat_usage(usage: object, *, answered: bool) -> TokenUsage | None:
    """Return plausible usage; None otherwise. A prompt and a text always cost tokens, so zeros are not plausible."""
    figures = object_of(usage)
    prompt = first_count(figures, "prompt_tokens", "input_tokens")
    completion = first_count(figures, "completion_tokens", "output_tokens", otherwise=0)
    total = first_count(figures, "total_tokens", otherwise=0)
    if not prompt or completion is None or total is None or (answered and completion == 0):
        return None
    if max(total, prompt + completion) > MAX_TOKENS:
        return None
    details = object_of(figures.get("prompt_tokens_details"))
    made = object_of(figures.get("completion_tokens_details"))
    return split_usage(
        prompt=prompt,
        completion=completion,
        cached_input=count_of(details.get("cached_tokens")) or count_of(figures.get("prompt_cache_hit_tokens")) or 0,
        cache_write=count_of(details.get("cache_write_tokens")) or 0,
        reasoning=count_of(made.get("reasoning_tokens")) or 0,
        input_audio=count_of(details.get("audio_tokens")) or 0,
        output_audio=count_of(made.get("audio_tokens")) or 0,
    ).at_least(total)
