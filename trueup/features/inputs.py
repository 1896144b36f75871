"""Inputs that several services share, validated: a business with its assistant, and the messages of a chat."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from trueup.errors import InvalidInputError
from trueup.llm.texts import cleaned_text

MAX_MESSAGE_CHARACTERS = 20_000

_Parsed = TypeVar("_Parsed", bound=BaseModel)

Text = Annotated[str, StringConstraints(strip_whitespace=True)]
Prose = Annotated[str, AfterValidator(cleaned_text)]
# The value becomes part of a system prompt, so it must be a plain language code.
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z]{2,4})?$")]


class Business(BaseModel):
    """The business whose assistant the model is, in its own words. All fields are optional."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Prose | None = Field(default=None, max_length=200)
    description: Prose | None = Field(default=None, max_length=5000)
    """Facts that an answer may use, such as products and delivery."""
    persona: Prose | None = Field(default=None, max_length=500)
    """The assistant's role and tone."""
    instructions: Prose | None = Field(default=None, max_length=5000)
    language: Language | None = None
    """The language to write in, such as "fa"; None: that of the message or draft."""

    def as_text(self) -> str:
        """Return the fields for a prompt, one per line, without the language, which the prompt states elsewhere."""
        parts = self.model_dump(exclude={"language"}, exclude_none=True)
        return "\n".join(f"{name}: {part}" for name, part in parts.items() if part)


class ChatMessage(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sender: Literal["customer", "business"]
    text: Annotated[Prose, Field(max_length=MAX_MESSAGE_CHARACTERS)]


def parse(kind: type[_Parsed], value: object, name: str) -> _Parsed:
    """Return the value as a model of `kind`. Raises `InvalidInputError` with the path of each wrong field in `name`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(_describe(kind, fault, name) for fault in error.errors()[:5])
        raise InvalidInputError(f"{faults}. Nothing was spent. Correct it and send it again.") from None


def _describe(kind: type[BaseModel], fault: Mapping[str, Any], name: str) -> str:
    path = ".".join([name, *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), kind.model_fields, n=1)
        return f"{path}: unknown option{f', did you mean {near[0]}?' if near else ''}"
    return f"{path}: {fault['msg'].removeprefix('Value error, ')}"
