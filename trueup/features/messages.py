"""Answer a customer's message in a chat, from the earlier messages and the business's own text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from trueup.errors import AnswerFormatError, InvalidInputError
from trueup.features.inputs import MAX_MESSAGE_CHARACTERS, Business, ChatMessage, parse
from trueup.features.links import KnownLinks, without_foreign_links
from trueup.llm import languages
from trueup.llm.model import Message, Model
from trueup.llm.prompt_fit import check_fits, cut_to_fit
from trueup.llm.prompts import reply_messages
from trueup.llm.texts import readable
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter, scaled_estimate

ESTIMATED_TOKENS = 1500
"""Estimate for one reply, by an exact counter. `estimated_tokens` scales it for other counters."""
_ANSWER_TOKENS = 400
# The business's text is never cut, because its last line may be a prohibition. The limit leaves room for the rest.
_MAX_BUSINESS_TOKENS = 750
MAX_HISTORY = 500


class ReplyResult(BaseModel):
    """The reply to a customer's message, and the part of the conversation that the model has read."""

    model_config = ConfigDict(frozen=True)

    reply: str
    language: str
    """The code of the reply's language, such as "fa"; "und" if it was not recognised."""
    history_used: int
    history_left_out: int
    """Count of older messages that did not fit the estimate."""
    message_cut: bool
    """The customer's message was too long; the model has read only its beginning."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplyPlan:
    """The prompt of a reply, and the parts that did not fit it."""

    messages: tuple[Message, ...]
    links: KnownLinks
    history_used: int
    history_left_out: int
    message_cut: bool


def estimated_tokens(counter: TokenCounter | None = None) -> int:
    """Return the estimate in tokens for one reply. `counter` None: that of the o200k encoding."""
    return scaled_estimate(ESTIMATED_TOKENS, counter or offline_counter())


def plan_reply(
    *,
    message: str,
    history: Sequence[Mapping[str, Any]] = (),
    business: Mapping[str, Any] | None = None,
    counter: TokenCounter | None = None,
) -> ReplyPlan:
    """Plan the prompt: the business's whole text, the message, and as much of the history as the estimate covers.

    `history`: fields of `ChatMessage`, oldest first; the newest are kept, each whole. `business`: fields of `Business`.
    `counter` None: that of the o200k encoding. The prompt depends on the arguments only, so that a redelivered task
    makes the same call. Raises `InvalidInputError` with the field.
    """
    counter = counter or offline_counter()
    asked = readable("message", message, minimum=1, maximum=MAX_MESSAGE_CHARACTERS)
    if len(history) > MAX_HISTORY:
        raise InvalidInputError(
            f"history has {len(history)} messages; the limit is {MAX_HISTORY}. Nothing was spent. Send the newest ones."
        )
    said = [parse(ChatMessage, entry, f"history.{index}") for index, entry in enumerate(history)]
    firm = parse(Business, business or {}, "business")
    about = firm.as_text()

    def prompt(text: str, lines: Sequence[str] = ()) -> tuple[Message, ...]:
        return reply_messages(business=about, conversation="\n".join(lines), message=text, language=firm.language)

    check_fits("business", prompt(""), scaled_estimate(_MAX_BUSINESS_TOKENS, counter), counter)
    budget = estimated_tokens(counter) - scaled_estimate(_ANSWER_TOKENS, counter)
    kept = cut_to_fit(asked, lambda text: count_prompt_tokens(prompt(text), counter) <= budget)
    lines: list[str] = []
    for entry in reversed(said):
        line = json.dumps({"from": entry.sender, "text": entry.text}, ensure_ascii=False)
        if count_prompt_tokens(prompt(kept, [line, *lines]), counter) > budget:
            break
        lines.insert(0, line)
    return ReplyPlan(
        messages=prompt(kept, lines),
        links=KnownLinks(about, *(entry.text for entry in said if entry.sender == "business")),
        history_used=len(lines),
        history_left_out=len(said) - len(lines),
        message_cut=kept != asked,
    )


def reply_to_message(
    model: Model,
    *,
    message: str,
    history: Sequence[Mapping[str, Any]] = (),
    business: Mapping[str, Any] | None = None,
    counter: TokenCounter | None = None,
) -> ReplyResult:
    """Answer a customer's message.

    The arguments are those of `plan_reply`; `history` does not include the message. Raises `InvalidInputError` for
    unusable input, `AnswerFormatError` if the model writes nothing, and the model's errors.
    """
    counter = counter or offline_counter()
    plan = plan_reply(message=message, history=history, business=business, counter=counter)
    answer_tokens = estimated_tokens(counter) - count_prompt_tokens(plan.messages, counter)
    completion = model.complete(plan.messages, max_completion_tokens=answer_tokens)
    warnings = ["The reply was cut off at its token limit."] if completion.truncated else []
    reply = without_foreign_links(completion.text, plan.links, warnings).strip()
    if not reply:
        raise AnswerFormatError(
            "The model wrote no reply. Its tokens are charged. Use another model (TRUEUP_MODEL_NAME)."
        )
    return ReplyResult(
        reply=reply,
        language=languages.detect(reply),
        history_used=plan.history_used,
        history_left_out=plan.history_left_out,
        message_cut=plan.message_cut,
        warnings=tuple(warnings),
    )
