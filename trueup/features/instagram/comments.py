"""Instagram's `comments` webhook, and an account's configuration of its answers."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from trueup.errors import InvalidInputError
from trueup.features.inputs import Language, Text, parse

# Ids become part of a URL, so they may have only letters, digits and underscores.
GraphId = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    StringConstraints(pattern=r"^[0-9A-Za-z_]{1,128}$"),
]


class CommentAuthor(BaseModel):
    """A comment's author. `username` None: Instagram sent none. `self_ig_scoped_id` not None: the account itself."""

    model_config = ConfigDict(frozen=True)

    id: GraphId
    username: str | None = None
    self_ig_scoped_id: GraphId | None = None


class CommentMedia(BaseModel):
    """The post that has the comment."""

    model_config = ConfigDict(frozen=True)

    id: GraphId


class CommentValue(BaseModel):
    """The comment. `parent_id` None: it does not answer another comment."""

    model_config = ConfigDict(frozen=True)

    id: GraphId
    text: Text = ""
    author: CommentAuthor = Field(alias="from")
    media: CommentMedia | None = None
    parent_id: GraphId | None = None


class CommentEvent(BaseModel):
    """One comment on a post of one account."""

    model_config = ConfigDict(frozen=True)

    account_id: GraphId
    comment: CommentValue

    @property
    def is_own(self) -> bool:
        """Whether the account wrote the comment. Answering its own comments would never end."""
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
    """A product that a message may mention. `price`: the shop's own text; `currency`: as text too."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: Annotated[Text, Field(min_length=1, max_length=300)]
    price: Text | None = Field(default=None, max_length=100)
    currency: Text | None = Field(default=None, max_length=20)
    description: Text | None = Field(default=None, max_length=5000)
    url: Text | None = Field(default=None, max_length=500)


class ActionConfig(BaseModel):
    """An account's answers to comments. PRODUCT: the model writes about the products. STATIC: always the same text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["STATIC", "PRODUCT"]
    static_message: Text | None = None
    products: tuple[ProductInfo, ...] = Field(default=(), max_length=100)
    product_context: Text | None = Field(default=None, max_length=20_000)
    """Other facts that the message may use, such as delivery terms and discounts."""
    language: Language | None = None
    """The message's language, such as "fa"; None: the comment's."""
    tone: Text | None = Field(default=None, max_length=100)
    public_reply_enabled: bool = False
    public_reply_text: Text | None = Field(default=None, max_length=2200)

    @model_validator(mode="after")
    def _has_what_its_mode_needs(self) -> Self:
        if self.mode == "STATIC" and not self.static_message:
            raise ValueError("static_message is empty, but mode STATIC sends it. Write the message")
        if self.mode == "PRODUCT" and not self.products and not self.product_context:
            raise ValueError(
                "products and product_context are both empty, but mode PRODUCT writes about them. Give one of them"
            )
        if self.public_reply_enabled and not self.public_reply_text:
            raise ValueError("public_reply_enabled is true, but public_reply_text is empty. Write it, or disable it")
        return self


def comment_events(payload: Mapping[str, Any]) -> tuple[CommentEvent, ...]:
    """Return the comments of a webhook payload, which may have several. Changes of other fields are ignored.

    Raises `InvalidInputError` for a payload that is not in Instagram's format.
    """
    parsed = parse(_Payload, payload, "event")
    return tuple(
        CommentEvent(account_id=entry.id, comment=parse(CommentValue, change.value, "event.entry.changes.value"))
        for entry in parsed.entry
        for change in entry.changes
        if change.field == "comments"
    )


def comment_event(payload: Mapping[str, Any]) -> CommentEvent:
    """Return the one comment of a webhook payload. Raises `InvalidInputError` if it has none or several."""
    events = comment_events(payload)
    if len(events) != 1:
        raise InvalidInputError(
            f"event has {len(events)} comments, but a task answers exactly one. Start one task for each comment."
        )
    return events[0]


def action_config(config: Mapping[str, Any]) -> ActionConfig:
    """Return the validated configuration. Raises `InvalidInputError` with the option and the remedy."""
    return parse(ActionConfig, config, "config")
