"""What several services take from outside, checked at the edge: a business and its assistant, a chat's messages."""

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
# Stands in a system prompt, so nothing but a code may be in it.
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z]{2,4})?$")]


class Business(BaseModel):
    """Whose assistant the model is, in the business's own words; all of it may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Prose | None = Field(default=None, max_length=200)
    description: Prose | None = Field(default=None, max_length=5000)
    """What it sells, where it delivers: facts that an answer may use."""
    persona: Prose | None = Field(default=None, max_length=500)
    """Who the assistant is, and how it speaks."""
    instructions: Prose | None = Field(default=None, max_length=5000)
    language: Language | None = None
    """The language to write in, such as "fa"; None means that of what is answered."""

    def as_text(self) -> str:
        """Return it for a prompt, a line for each part that is there; the language is said elsewhere."""
        parts = self.model_dump(exclude={"language"}, exclude_none=True)
        return "\n".join(f"{name}: {part}" for name, part in parts.items() if part)


class ChatMessage(BaseModel):
    """One message of a chat, as it was sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sender: Literal["customer", "business"]
    text: Annotated[Prose, Field(max_length=MAX_MESSAGE_CHARACTERS)]


def parse(kind: type[_Parsed], value: object, name: str) -> _Parsed:
    """Return the value as that model. Raises `InvalidInputError`, naming the field, below `name`, and the remedy."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(_describe(kind, fault, name) for fault in error.errors()[:5])
        raise InvalidInputError(f"{faults}. Correct it and send it again.") from None


def _describe(kind: type[BaseModel], fault: Mapping[str, Any], name: str) -> str:
    path = ".".join([name, *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), kind.model_fields, n=1)
        return f"{path}: no such option{f', did you mean {near[0]}?' if near else ''}"
    return f"{path}: {fault['msg'].removeprefix('Value error, ')}"
