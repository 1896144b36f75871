"""Settings of models: how their tokens count, and how their prompts are bounded."""

from collections.abc import Mapping
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

TokenClass = Literal["input", "cached_input", "cache_write", "output", "reasoning", "audio", "other"]
# OpenAI's, which are built in.
ENCODINGS = ("o200k_base", "cl100k_base")
# Before the path of a tokenizer in Hugging Face's format.
FILE_PREFIX = "file:"
Weight = Annotated[Decimal, Field(ge=0, le=1000)]


class ModelSettings(BaseModel):
    """What holds for the models of one pattern: [models."llama*"] in trueup.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[Decimal, Field(gt=0, le=1000)] = Field(
        default=Decimal(1), description="each token counts so much against the budget"
    )
    tokenizer: str | None = Field(
        default=None, description="what counts this model's prompts: o200k_base, cl100k_base, or file:tokenizer.json"
    )
    ratio: Annotated[Decimal, Field(gt=0, le=1)] | None = Field(
        default=None, description="a byte of a prompt costs at most so many tokens; unset: learned"
    )

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, tokenizer: str | None) -> str | None:
        if not tokenizer or tokenizer in ENCODINGS:
            return tokenizer or None
        if not tokenizer.startswith(FILE_PREFIX):
            raise ValueError(f"give {', '.join(ENCODINGS)}, or the model's own file: {FILE_PREFIX}tokenizer.json")
        path = Path(tokenizer.removeprefix(FILE_PREFIX)).expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"there is no file {path}. Correct the path, or download the model's tokenizer.json to it")
        return f"{FILE_PREFIX}{path}"

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of the model's tokenizer. None: an encoding, or nothing, is set."""
        if self.tokenizer is None or self.tokenizer in ENCODINGS:
            return None
        return Path(self.tokenizer.removeprefix(FILE_PREFIX))


def settings_of_model(models: Mapping[str, ModelSettings], name: str) -> ModelSettings:
    """Return the settings of the longest pattern that fits the model's name; the defaults if none fits.

    A pattern has `*` for any text and ignores case. It may also fit the last part of a name such as `openai/gpt-5`.
    """
    lower = name.strip().lower()
    names = (lower, lower.rpartition("/")[2])
    fitting = [pattern for pattern in models if any(fnmatchcase(one, pattern.lower()) for one in names)]
    return models[max(fitting, key=len)] if fitting else ModelSettings()
