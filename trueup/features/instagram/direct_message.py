"""Answer an Instagram comment with a direct message."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trueup.errors import AnswerFormatError, InvalidInputError
from trueup.features.instagram.buttons import MAX_TEXT_CHARACTERS, Button, split_buttons, without_markers
from trueup.features.instagram.comments import ActionConfig, CommentEvent, ProductInfo
from trueup.features.instagram.effects import Outbox
from trueup.features.instagram.graph import GraphClient, GraphError
from trueup.features.links import KnownLinks, without_foreign_links
from trueup.llm.model import Message, Model
from trueup.llm.prompts import dm_messages
from trueup.llm.texts import cut_at_word, cut_to_bytes, cut_to_characters, without_lone_surrogates
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter, scaled_estimate

MESSAGE_EFFECT = "instagram_message"
REPLY_EFFECT = "instagram_public_reply"

ESTIMATED_TOKENS = 1000
"""Estimate for one message, by an exact counter. `estimated_tokens` scales it for other counters."""
_ANSWER_TOKENS = 350
# Meta's pages state both "1000 bytes or less" and "less than 1000 characters"; 999 bytes satisfy both.
MAX_MESSAGE_BYTES = 999
_MAX_COMMENT_CHARACTERS = 400
_SPARED_NOTES_CHARACTERS = 400
_MAX_DESCRIPTION_CHARACTERS = 150
_MAX_AUTHOR_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class BuiltMessage:
    """A message ready to send. `warnings`: the changes that its limits required."""

    text: str
    buttons: tuple[Button, ...] = ()
    warnings: tuple[str, ...] = ()


class DmResult(BaseModel):
    """The outcome for one comment. Ids are None if nothing was sent or Instagram returned none."""

    model_config = ConfigDict(frozen=True)

    status: Literal["sent", "skipped", "unknown"]
    """"unknown": an earlier attempt may have sent the message, so it was not sent again."""
    reason: str | None = None
    """The reason of "skipped" and "unknown"."""
    mode: Literal["STATIC", "PRODUCT"]
    comment_id: str
    message: str | None = None
    buttons: tuple[Button, ...] = ()
    message_id: str | None = None
    public_reply_sent: bool = False
    public_reply_id: str | None = None
    warnings: tuple[str, ...] = ()


def estimated_tokens(counter: TokenCounter | None = None) -> int:
    """Return the estimate in tokens for one message. `counter` None: that of the o200k encoding."""
    return scaled_estimate(ESTIMATED_TOKENS, counter or offline_counter())


def send_instagram_dm(
    model: Model | None,
    *,
    event: CommentEvent,
    config: ActionConfig,
    graph: GraphClient,
    outbox: Outbox,
    counter: TokenCounter | None = None,
) -> DmResult:
    """Answer a comment by direct message and, if configured, publicly; each at most once.

    `model` None: allowed in mode STATIC. `counter` None: that of the o200k encoding. The account's own comments are
    skipped. A failed public reply is only a warning, because the message was sent before. Raises `GraphError` if the
    message was not sent or its outcome is unknown, and the errors of `build_message`.
    """
    comment = event.comment
    if event.is_own:
        reason = "The account itself wrote the comment."
        return DmResult(status="skipped", reason=reason, mode=config.mode, comment_id=comment.id)
    outcome = outbox.find(MESSAGE_EFFECT)
    if outcome is None or outcome.status != "sent":
        built = build_message(model, event=event, config=config, counter=counter)
        detail = {
            "comment_id": comment.id,
            "message": built.text,
            "buttons": [button.model_dump() for button in built.buttons],
            "warnings": list(built.warnings),
        }

        def send() -> dict[str, Any]:
            sent = graph.send_private_reply(
                account_id=event.account_id, comment_id=comment.id, text=built.text, buttons=built.buttons
            )
            return {"message_id": sent}

        outcome = outbox.once(MESSAGE_EFFECT, detail, send)
    if outcome.status != "sent":
        reason = "An earlier attempt may have sent the message. Check the conversation before you send it again."
        return DmResult(status="unknown", reason=reason, mode=config.mode, comment_id=comment.id)
    warnings = list(outcome.detail.get("warnings", []))
    reply_sent, reply_id = _reply_publicly(graph, outbox, comment.id, config, warnings)
    return DmResult(
        status="sent",
        mode=config.mode,
        comment_id=comment.id,
        message=outcome.detail.get("message"),
        buttons=tuple(Button(**button) for button in outcome.detail.get("buttons", [])),
        message_id=outcome.detail.get("message_id"),
        public_reply_sent=reply_sent,
        public_reply_id=reply_id,
        warnings=tuple(warnings),
    )


def build_message(
    model: Model | None, *, event: CommentEvent, config: ActionConfig, counter: TokenCounter | None = None
) -> BuiltMessage:
    """Return the message that answers a comment. In mode STATIC it is configured; in mode PRODUCT the model writes it.

    `counter` None: that of the o200k encoding. Raises `InvalidInputError` for PRODUCT without a model,
    `AnswerFormatError` if the model writes nothing, and the model's errors.
    """
    if config.mode == "STATIC":
        return _fitted(config.static_message or "", [])
    if model is None:
        raise InvalidInputError("mode PRODUCT needs a model, but got none. Nothing was sent. Run it in a metered task.")
    return _ask(model, event, config, counter or offline_counter())


def _ask(model: Model, event: CommentEvent, config: ActionConfig, counter: TokenCounter) -> BuiltMessage:
    messages = _prompt(event, config, counter)
    answer_tokens = estimated_tokens(counter) - count_prompt_tokens(messages, counter)
    completion = model.complete(messages, max_completion_tokens=max(1, answer_tokens))
    warnings = ["The model's message was cut off at its token limit."] if completion.truncated else []
    text = _with_own_links_only(completion.text, config, warnings).strip()
    if not text:
        raise AnswerFormatError(
            "The model wrote no message, so none was sent. Its tokens are charged. "
            "Use another model (TRUEUP_MODEL_NAME)."
        )
    return _fitted(text, warnings)


def _prompt(event: CommentEvent, config: ActionConfig, counter: TokenCounter) -> Sequence[Message]:
    """Return the prompt with as many products and notes as fit beside the answer."""
    budget = estimated_tokens(counter) - scaled_estimate(_ANSWER_TOKENS, counter)
    products = [_product_line(product) for product in config.products]
    notes = config.product_context or ""
    comment = cut_at_word(event.comment.text, _MAX_COMMENT_CHARACTERS)
    while True:
        messages = dm_messages(
            comment=comment,
            author=(event.comment.author.username or "")[:_MAX_AUTHOR_CHARACTERS],
            products="\n".join(products),
            notes=notes,
            language=config.language,
            tone=config.tone,
        )
        excess = count_prompt_tokens(messages, counter) - budget
        if excess <= 0 or not (notes or comment or len(products) > 1):
            return messages
        # Cut long notes first, then drop the last products, then cut the rest of the notes, then the comment.
        if len(notes) > _SPARED_NOTES_CHARACTERS or (notes and len(products) <= 1):
            notes = cut_at_word(notes, max(0, len(notes) - max(20, excess)))
        elif len(products) > 1:
            products = products[: len(products) * 3 // 4]
        else:
            comment = cut_at_word(comment, len(comment) * 3 // 4)


def _product_line(product: ProductInfo) -> str:
    price = " ".join(part for part in (product.price, product.currency) if part)
    facts = {
        "name": product.name,
        "price": price,
        "description": cut_at_word(product.description or "", _MAX_DESCRIPTION_CHARACTERS),
        "url": product.url or "",
    }
    return json.dumps({name: fact for name, fact in facts.items() if fact}, ensure_ascii=False)


def _with_own_links_only(text: str, config: ActionConfig, warnings: list[str]) -> str:
    """Remove links that are not the shop's own, and buttons with such links."""
    known = KnownLinks(config.product_context or "", *(product.url or "" for product in config.products))
    own = without_markers(text, lambda marker: not known.has_all_of(marker))
    if own != text:
        warnings.append("A button with a link that the shop did not give was removed from the message.")
    return without_foreign_links(own, known, warnings)


def _fitted(text: str, warnings: list[str]) -> BuiltMessage:
    warnings = list(warnings)
    text, buttons = split_buttons(without_lone_surrogates(text), warnings)
    if buttons:
        kept, limit = cut_to_characters(text, MAX_TEXT_CHARACTERS), f"{MAX_TEXT_CHARACTERS} characters above buttons"
    else:
        kept, limit = cut_to_bytes(text, MAX_MESSAGE_BYTES), f"{MAX_MESSAGE_BYTES} bytes"
    if len(kept) < len(text):
        warnings.append(f"The message was cut to Instagram's limit of {limit}.")
    return BuiltMessage(text=kept, buttons=buttons, warnings=tuple(warnings))


def _reply_publicly(
    graph: GraphClient, outbox: Outbox, comment_id: str, config: ActionConfig, warnings: list[str]
) -> tuple[bool, str | None]:
    text = config.public_reply_text
    if not config.public_reply_enabled or not text:
        return False, None
    try:
        outcome = outbox.once(
            REPLY_EFFECT,
            {"comment_id": comment_id, "text": text},
            lambda: {"reply_id": graph.reply_to_comment(comment_id=comment_id, text=text)},
        )
    except GraphError as error:
        warnings.append(f"The message was sent, the public reply was not: {error}")
        return False, None
    if outcome.status != "sent":
        warnings.append(
            "The message was sent. An earlier attempt may have sent the public reply, so it was not sent again."
        )
        return False, None
    return True, outcome.detail.get("reply_id")
