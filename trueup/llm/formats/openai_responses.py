"""OpenAI Responses."""

from typing import Any

from trueup.errors import UnboundedCallError
from trueup.llm.formats.prompts import Unknown, bounded_prompt, media_in
from trueup.llm.formats.reader import Reader
from trueup.llm.formats.reading import count_of, first_count, list_of, object_of, requested_count, strings_in
from trueup.llm.formats.usage import TokenUsage, split_usage
from trueup.llm.formats.wire_format import AnswerReader, Body, BodyFormat, Count, Sent
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import TokenCounter

_TEXT_PARTS = frozenset(("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"))
# What a caller's own code runs. The provider runs all other tools, and bills what they read.
_OWN_TOOLS = frozenset(("function", "custom", "local_shell", "shell", "apply_patch"))
# Fields whose content only the provider knows.
_STORED = ("previous_response_id", "conversation", "prompt")
_PROMPT_FIELDS = ("instructions", "tools", "text")
_MARKS = frozenset(("id", "type", "role", "status", "call_id", "annotations", "logprobs", "encrypted_content"))
_ENDS = ("response.completed", "response.incomplete", "response.failed")


class Responses(BodyFormat):
    """POST …/responses"""

    name = "openai responses"

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        if sent.body.get("background"):
            raise UnboundedCallError(
                "it runs in the background, so its usage is reported to no one who waits for it",
                "Leave out `background`, and call from a task.",
            )
        items = sent.body.get("input")
        messages = [{"role": "user", "content": items}] if isinstance(items, str) else list_of(items)
        rest = {name: value for name in _PROMPT_FIELDS if (value := sent.body.get(name))}
        return Demand(
            prompt_tokens=bounded_prompt(sent, counter, messages, rest, _unknown_part(sent.body, messages)),
            wanted=requested_count(sent.body, "max_output_tokens"),
        )

    def count_request(self, sent: Sent) -> Count | None:
        fields = ("model", "input", "instructions", "tools", "text", "tool_choice", *_STORED)
        body = {name: value for name in fields if (value := sent.body.get(name)) is not None}
        return Count(ending="/input_tokens", body=body, answer="input_tokens")

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        given = requested_count(sent.body, "max_output_tokens")
        return sent.body if given is not None and given <= limit else sent.body | {"max_output_tokens": limit}

    def adds_usage(self, sent: Sent) -> bool:
        return False

    def reader(self, sent: Sent) -> AnswerReader:
        return ResponsesReader()


def _unknown_part(body: Body, messages: list[Any]) -> Unknown | None:
    """Return what in the prompt can't be counted here; None if all of it can."""
    stored = next((name for name in _STORED if body.get(name)), None)
    if stored is not None:
        return Unknown(what=f"a {stored!r} that only the provider knows")
    for tool in list_of(body.get("tools")):
        kind = object_of(tool).get("type")
        if kind not in _OWN_TOOLS:
            return Unknown(what=f"a tool {kind!r:.40} that the provider runs", is_countable=False)
    if any(object_of(message).get("type") == "item_reference" for message in messages):
        return Unknown(what="a reference to an item that only the provider knows")
    return media_in(messages, _TEXT_PARTS)


class ResponsesReader(Reader):
    """Reads a response or the events of one."""

    def add(self, event: str | None, data: object) -> bool:
        body = object_of(data)
        kind = body.get("type")
        if isinstance(kind, str) and kind.startswith("response."):
            self._read_event(kind, body)
        elif "output" in body:
            self._read_response(body)
            self._note_texts(strings_in(body["output"], without=_MARKS))
        elif "usage" in body:  # the end of a long answer
            self._usage = _usage(body["usage"])
        return False

    def _read_event(self, kind: str, body: dict[str, Any]) -> None:
        self.has_begun = True
        if isinstance(body.get("response"), dict):
            self._note_model(body["response"].get("model"))
        if kind.endswith(".delta"):
            self._note_texts(strings_in(body.get("delta")))
        elif kind in _ENDS:
            self._read_response(object_of(body.get("response")))

    def _read_response(self, response: dict[str, Any]) -> None:
        self.has_begun = self.is_complete = True
        self._note_model(response.get("model"))
        self._usage = _usage(response.get("usage"))


def _usage(usage: object) -> TokenUsage | None:
    figures = object_of(usage)
    prompt = first_count(figures, "input_tokens", "prompt_tokens")
    completion = first_count(figures, "output_tokens", "completion_tokens")
    if not prompt or completion is None:
        return None
    details, made = object_of(figures.get("input_tokens_details")), object_of(figures.get("output_tokens_details"))
    return split_usage(
        prompt=prompt,
        completion=completion,
        cached_input=count_of(details.get("cached_tokens")) or 0,
        cache_write=count_of(details.get("cache_write_tokens")) or 0,
        reasoning=count_of(made.get("reasoning_tokens")) or 0,
        input_audio=count_of(details.get("audio_tokens")) or 0,
        output_audio=count_of(made.get("audio_tokens")) or 0,
    ).at_least(count_of(figures.get("total_tokens")))
