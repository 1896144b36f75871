"""Write a better prompt from a business's own draft, for the assistant that answers its customers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from trueup.errors import AnswerFormatError
from trueup.features.inputs import Business, parse
from trueup.llm import languages
from trueup.llm.model import Message, Model
from trueup.llm.prompt_fit import check_fits
from trueup.llm.prompts import enhancement_messages
from trueup.llm.texts import readable
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter, scaled_estimate

ESTIMATED_TOKENS = 700
"""Estimate for a draft of usual length, by an exact counter. `estimated_tokens` scales it for other counters."""
_MIN_ANSWER_TOKENS = 250
# The better prompt keeps the draft's content and adds to it.
_ANSWER_TOKENS_PER_DRAFT_TOKEN = 2
# Enough for a draft of maximum length in ordinary prose. A draft of rarer characters may exceed it and is refused.
_MAX_PROMPT_TOKENS = 3000
MAX_DRAFT_CHARACTERS = 8000


class PromptResult(BaseModel):
    """The better prompt. `complete` False: it was cut off at its token limit."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    language: str
    """The code of the prompt's language, such as "fa"; "und" if it was not recognised."""
    complete: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnhancementPlan:
    """The model call and its estimated cost in tokens."""

    messages: tuple[Message, ...]
    prompt_tokens: int
    answer_tokens: int

    @property
    def estimated_tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


def estimated_tokens(counter: TokenCounter | None = None) -> int:
    """Return the estimate in tokens for a draft of usual length. `counter` None: that of the o200k encoding."""
    return scaled_estimate(ESTIMATED_TOKENS, counter or offline_counter())


def plan_enhancement(
    *, prompt: str, business: Mapping[str, Any] | None = None, counter: TokenCounter | None = None
) -> EnhancementPlan:
    """Plan the model call: the usual estimate, or more for a draft that does not fit it.

    `prompt`: the draft. `business`: fields of `Business`. `counter` None: that of the o200k encoding. Nothing is cut,
    because a prompt that lacks one of its rules is worse than no prompt. Raises `InvalidInputError` with the field.
    """
    counter = counter or offline_counter()
    draft = readable("prompt", prompt, minimum=1, maximum=MAX_DRAFT_CHARACTERS)
    firm = parse(Business, business or {}, "business")
    messages = enhancement_messages(draft=draft, business=firm.as_text(), language=firm.language)
    check_fits("prompt", messages, scaled_estimate(_MAX_PROMPT_TOKENS, counter), counter)
    prompt_tokens = count_prompt_tokens(messages, counter)
    wanted = max(scaled_estimate(_MIN_ANSWER_TOKENS, counter), _ANSWER_TOKENS_PER_DRAFT_TOKEN * counter.count(draft))
    return EnhancementPlan(
        messages=messages,
        prompt_tokens=prompt_tokens,
        answer_tokens=max(wanted, estimated_tokens(counter) - prompt_tokens),
    )


def enhance_prompt(
    model: Model, *, prompt: str, business: Mapping[str, Any] | None = None, counter: TokenCounter | None = None
) -> PromptResult:
    """Write a better prompt from a draft.

    The arguments are those of `plan_enhancement`. Raises `InvalidInputError` for unusable input, `AnswerFormatError` if
    the model writes nothing, and the model's errors.
    """
    plan = plan_enhancement(prompt=prompt, business=business, counter=counter)
    completion = model.complete(plan.messages, max_completion_tokens=plan.answer_tokens)
    better = completion.text.strip()
    if not better:
        raise AnswerFormatError(
            "The model wrote no prompt. Its tokens are charged. Use another model (TRUEUP_MODEL_NAME)."
        )
    cut = ["The prompt was cut off at its token limit; its end is missing."] if completion.truncated else []
    return PromptResult(
        prompt=better, language=languages.detect(better), complete=not completion.truncated, warnings=tuple(cut)
    )
