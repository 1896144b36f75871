"""The format of OpenAI's chat completions: prompts, and answers read for the user (text, and whether it was cut)."""

from collections.abc import Sequence
from typing import Any

from trueup.llm.formats.openai_chat import ChatReader
from trueup.llm.formats.reading import list_of, object_of
from trueup.llm.formats.wire_format import AnswerReader
from trueup.llm.model import Message
from trueup.llm.providers.maker import Part


def chat_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return a prompt as the format has it."""
    return [{"role": message.role, "content": message.content} for message in messages]


class ChatAnswers:
    """The part of a `Maker` that reads answers."""

    def reader(self) -> AnswerReader:
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


def _first_choice(part: Part) -> dict[str, Any]:
    return object_of(next(iter(list_of(part.get("choices"))), None))
