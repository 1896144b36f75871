"""Instagram's `comments` webhook, and what an account has configured to answer a comment with."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from trueup.errors import InvalidInputError
from trueup.features.inputs import Language, Text, parse

# Ids become parts of a URL: nothing but letters, digits and underscores may be in them.
GraphId = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    StringConstraints(pattern=r"^[0-9A-Za-z_]{1,128}$"),
]


class CommentAuthor(BaseModel):
    """Who commented. `username` None: Instagram did not say. `self_ig_scoped_id`: the account itself did."""

    model_config = ConfigDict(frozen=True)

    id: GraphId
    username: str | None = None
    self_ig_scoped_id: GraphId | None = None


class CommentMedia(BaseModel):
    """The post that was commented on."""

    model_config = ConfigDict(frozen=True)

    id: GraphId


class CommentValue(BaseModel):
    """The comment itself. `parent_id` None: it is no answer to another comment."""

    model_config = ConfigDict(frozen=True)

    id: GraphId
    text: Text = ""
    author: CommentAuthor = Field(alias="from")
    media: CommentMedia | None = None
    parent_id: GraphId | None = None


class CommentEvent(BaseModel):
    """One comment on one account's post."""

    model_config = ConfigDict(frozen=True)

    account_id: GraphId
    comment: CommentValue

    @property
    def is_own(self) -> bool:
        """Whether the account commented itself: answering that would be an endless conversation."""
        author = self.comment.author
        return author.id == self.account_id or author.self_ig_scoped_id is not None


class _Change(BaseModel):
    field: str
    value: dict[str, Any]


class _Entry(BaseModel):
    id: GraphId
    changes: list[_Change] = []


class _Payload(BaseModel):
    object: Literal["instagram"] = "instagram"
    entry: list[_Entry]


class ProductInfo(BaseModel):
    """A product that a message may speak of. `price` is text as the shop writes it, with its currency."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: Annotated[Text, Field(min_length=1, max_length=300)]
    price: Text | None = Field(default=None, max_length=100)
    currency: Text | None = Field(default=None, max_length=20)
    description: Text | None = Field(default=None, max_length=5000)
    url: Text | None = Field(default=None, max_length=500)


class ActionConfig(BaseModel):
    """How an account answers comments. PRODUCT: a message about its products. STATIC: always the same one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["STATIC", "PRODUCT"]
    static_message: Text | None = None
    products: tuple[ProductInfo, ...] = Field(default=(), max_length=100)
    product_context: Text | None = Field(default=None, max_length=20_000)
    """Anything else the message may draw on: delivery terms, discounts."""
    language: Language | None = None
    """The message's language, such as "fa"; None means the comment's."""
    tone: Text | None = Field(default=None, max_length=100)
    public_reply_enabled: bool = False
    public_reply_text: Text | None = Field(default=None, max_length=2200)

    @model_validator(mode="after")
    def _has_what_its_mode_needs(self) -> Self:
        if self.mode == "STATIC" and not self.static_message:
            raise ValueError("static_message is empty, but the mode is STATIC: write the message to send")
        if self.mode == "PRODUCT" and not self.products and not self.product_context:
            raise ValueError(
                "neither products nor product_context is given, but the mode is PRODUCT: say what the message is about"
            )
        if self.public_reply_enabled and not self.public_reply_text:
            raise ValueError("public_reply_text is empty, but public_reply_enabled is set: write it, or switch it off")
        return self


def comment_events(payload: Mapping[str, Any]) -> tuple[CommentEvent, ...]:
    """Return the comments of a webhook payload, which may bring several, and other fields that are passed over.

    Raises `InvalidInputError` for a payload that is none of Instagram's.
    """
    parsed = parse(_Payload, payload, "event")
    return tuple(
        CommentEvent(account_id=entry.id, comment=parse(CommentValue, change.value, "event.entry.changes.value"))
        for entry in parsed.entry
        for change in entry.changes
        if change.field == "comments"
    )


def comment_event(payload: Mapping[str, Any]) -> CommentEvent:
    """Return the one comment of a webhook payload. Raises `InvalidInputError` when it brings none, or several."""
    events = comment_events(payload)
    if len(events) != 1:
        raise InvalidInputError(
            f"event brings {len(events)} comments, and one task answers one. Start a task for each comment."
        )
    return events[0]


def action_config(config: Mapping[str, Any]) -> ActionConfig:
    """Return the configuration, checked. Raises `InvalidInputError`, naming the option and the remedy."""
    return parse(ActionConfig, config, "config")
