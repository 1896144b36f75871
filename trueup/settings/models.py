"""Settings of models: how their tokens count, and how their prompts are bounded."""

from collections.abc import Mapping
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenClass = Literal["input", "cached_input", "cache_write", "output", "reasoning", "audio", "other"]
Weight = Annotated[Decimal, Field(ge=0, le=1000)]


class ModelSettings(BaseModel):
    """What holds for the models of one pattern: [models."llama*"] in trueup.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[Decimal, Field(gt=0, le=1000)] = Field(
        default=Decimal(1), description="each token counts so much against the budget"
    )
    tokenizer: Literal["o200k_base", "cl100k_base"] | None = Field(
        default=None, description="the encoding that counts this model's prompts"
    )
    ratio: Annotated[Decimal, Field(gt=0, le=1)] | None = Field(
        default=None, description="a byte of a prompt costs at most so many tokens; unset: learned"
    )


def settings_of_model(models: Mapping[str, ModelSettings], name: str) -> ModelSettings:
    """Return the settings of the longest pattern that fits the model's name; the defaults if none fits.

    A pattern has `*` for any text and ignores case. It may also fit the last part of a name such as `openai/gpt-5`.
    """
    lower = name.strip().lower()
    names = (lower, lower.rpartition("/")[2])
    fitting = [pattern for pattern in models if any(fnmatchcase(one, pattern.lower()) for one in names)]
    return models[max(fitting, key=len)] if fitting else ModelSettings()
