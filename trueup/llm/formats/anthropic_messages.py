"""Anthropic Messages."""

from typing import Any

from trueup.llm.formats.prompts import Unknown, bounded_prompt
from trueup.llm.formats.reader import Reader
from trueup.llm.formats.reading import count_of, list_of, object_of, requested_count, strings_in
from trueup.llm.formats.usage import TokenUsage, split_usage
from trueup.llm.formats.wire_format import AnswerReader, Body, BodyFormat, Count, Sent
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import TokenCounter

_TEXT_BLOCKS = frozenset(("text", "thinking", "redacted_thinking", "tool_use", "tool_result"))
# Tools that the caller's code runs, whose description the provider adds.
_OWN_TOOLS = ("custom", "bash_", "text_editor_", "computer_", "memory_")
# The provider's own prompt for tools has up to 530 tokens, the description of one of its tools up to 740.
_TOOLS_TOKENS, _DESCRIBED_TOOL_TOKENS = 600, 800
# The provider refuses a smaller budget for thinking, and a budget that is not below the answer's cap.
_LEAST_THINKING = 1_024
_MARKS = frozenset(("type", "id", "name", "signature", "citations", "tool_use_id"))
_PROMPT_USAGE = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Messages(BodyFormat):
    """POST …/messages"""

    name = "anthropic messages"

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        body = sent.body
        messages = list_of(body.get("messages"))
        tools = list_of(body.get("tools"))
        rest = {name: value for name in ("system", "tools", "output_format") if (value := body.get(name))}
        tokens = bounded_prompt(sent, counter, messages, rest, _unknown_part(body, messages, tools))
        if tools:
            described = sum(object_of(tool).get("type") not in (None, "custom") for tool in tools)
            tokens += _TOOLS_TOKENS + described * _DESCRIBED_TOOL_TOKENS
        return Demand(
            prompt_tokens=tokens,
            wanted=requested_count(body, "max_tokens"),
            least=_LEAST_THINKING + 1 if _thinking_budget(body) else 1,
        )

    def count_request(self, sent: Sent) -> Count | None:
        fields = ("model", "messages", "system", "tools", "tool_choice", "thinking", "mcp_servers")
        body = {name: value for name in fields if (value := sent.body.get(name)) is not None}
        return Count(ending="/count_tokens", body=body, answer="input_tokens")

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        wanted = requested_count(sent.body, "max_tokens")
        if wanted is not None and wanted <= limit:
            return sent.body
        changed: Body = {"max_tokens": limit}
        budget = _thinking_budget(sent.body)
        if budget is not None:
            # As large a part of the cap as before.
            part = limit * budget // wanted if wanted else limit
            lowered = max(_LEAST_THINKING, min(budget, part, limit - 1))
            changed["thinking"] = object_of(sent.body.get("thinking")) | {"budget_tokens": lowered}
        return sent.body | changed

    def adds_usage(self, sent: Sent) -> bool:
        return False

    def reader(self, sent: Sent) -> AnswerReader:
        return MessagesReader()


def _thinking_budget(body: Body) -> int | None:
    thinking = object_of(body.get("thinking"))
    return requested_count(thinking, "budget_tokens") if thinking.get("type") == "enabled" else None


def _unknown_part(body: Body, messages: list[Any], tools: list[Any]) -> Unknown | None:
    """Return what in the prompt can't be counted here; None if all of it can."""
    for tool in tools:
        kind = object_of(tool).get("type", "custom")
        if not str(kind).startswith(_OWN_TOOLS):
            return Unknown(what=f"a tool {kind!r:.40} that the provider runs", is_countable=False)
    if body.get("mcp_servers") or body.get("container"):
        return Unknown(what="servers or a container that the provider uses", is_countable=False)
    return next((kind for message in messages if (kind := _media(object_of(message).get("content"))) is not None), None)


def _media(content: object) -> Unknown | None:
    for block in list_of(content):
        kind = object_of(block).get("type")
        if not isinstance(block, str) and kind not in _TEXT_BLOCKS:
            return Unknown(what=f"a block of type {kind!r:.40}")
        if kind == "tool_result" and (inner := _media(object_of(block).get("content"))) is not None:
            return inner
    return None


class MessagesReader(Reader):
    """Reads a message or the events of one. Counts of later events replace earlier ones: they are sums."""

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, Any] = {}

    def add(self, event: str | None, data: object) -> bool:
        body = object_of(data)
        kind = body.get("type")
        if kind == "message_start":
            self.has_begun = True
            message = object_of(body.get("message"))
            self._note_model(message.get("model"))
            self._note_figures(message.get("usage"))
        elif kind == "content_block_delta":
            self._note_texts(strings_in(body.get("delta"), without=_MARKS))
        elif kind == "message_delta":
            self._note_figures(body.get("usage"))
            self._is_finished |= bool(object_of(body.get("delta")).get("stop_reason"))
        elif kind == "message_stop":
            self.is_complete = True
        elif kind == "message":
            self.has_begun = self.is_complete = self._is_finished = True
            self._note_model(body.get("model"))
            self._note_texts(strings_in(body.get("content"), without=_MARKS))
            self._note_figures(body.get("usage"))
        elif "usage" in body:  # the end of a long answer
            self.has_begun = self._is_finished = True
            self._note_figures(body["usage"])
        return False

    @property
    def usage(self) -> TokenUsage | None:
        return _usage(self._figures) if self._is_finished else None

    def _note_figures(self, usage: object) -> None:
        self._figures |= {name: value for name, value in object_of(usage).items() if value is not None}
        if count_of(self._figures.get("input_tokens")) is not None:
            self.prompt_tokens = sum(count_of(self._figures.get(name)) or 0 for name in _PROMPT_USAGE) or None


def _usage(figures: dict[str, Any]) -> TokenUsage | None:
    """Return the usage. The prompt's count here excludes what a cache gave or stored; the classes are added up."""
    fresh, output = count_of(figures.get("input_tokens")), count_of(figures.get("output_tokens"))
    written = count_of(figures.get("cache_creation_input_tokens") or 0)
    read = count_of(figures.get("cache_read_input_tokens") or 0)
    if fresh is None or output is None or written is None or read is None or not fresh + written + read:
        return None
    return split_usage(
        prompt=fresh + written + read,
        completion=output,
        cached_input=read,
        cache_write=written,
        reasoning=count_of(object_of(figures.get("output_tokens_details")).get("thinking_tokens")) or 0,
    )
