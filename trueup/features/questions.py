"""Answer a question: from passages of context if there are any, otherwise from the model's own knowledge."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from trueup.errors import AnswerFormatError, InvalidInputError
from trueup.features.answers import object_with
from trueup.llm import languages
from trueup.llm.model import Message, Model
from trueup.llm.prompt_fit import check_fits, cut_to_fit
from trueup.llm.prompts import question_messages
from trueup.llm.texts import readable
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter, scaled_estimate

ESTIMATED_TOKENS = 1500
"""Estimate for one answer, by an exact counter. `estimated_tokens` scales it for other counters."""
_ANSWER_TOKENS = 400
_MAX_QUESTION_TOKENS = 700
MAX_QUESTION_CHARACTERS = 4000
MAX_PASSAGES = 100
MAX_PASSAGE_CHARACTERS = 50_000


class QuestionResult(BaseModel):
    """The answer to a question. Passages are numbered by their positions in the context, from 0."""

    model_config = ConfigDict(frozen=True)

    answer: str
    answered: bool
    """False: the context (or the model, if there is no context) does not have the answer, and `answer` says so."""
    passages_used: tuple[int, ...]
    """The passages that the model names as its sources."""
    passages_left_out: int
    """Count of passages that did not fit the estimate."""
    passage_cut: int | None
    """The last passage, if the model has read only its beginning; otherwise None."""
    language: str
    """The code of the answer's language, such as "fa"; "und" if it was not recognised."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuestionPlan:
    """The prompt of a question. `passages_read`: count of the context's passages in it, from the first."""

    messages: tuple[Message, ...]
    passages_read: int
    passages_left_out: int
    passage_cut: int | None


def estimated_tokens(counter: TokenCounter | None = None) -> int:
    """Return the estimate in tokens for one answer. `counter` None: that of the o200k encoding."""
    return scaled_estimate(ESTIMATED_TOKENS, counter or offline_counter())


def plan_question(*, question: str, context: Sequence[str] = (), counter: TokenCounter | None = None) -> QuestionPlan:
    """Plan the prompt: the whole question, and as many of the passages, in their order, as the estimate covers.

    `context`: the passages, the most relevant first. `counter` None: that of the o200k encoding. Raises
    `InvalidInputError` with the field.
    """
    counter = counter or offline_counter()
    asked = readable("question", question, minimum=1, maximum=MAX_QUESTION_CHARACTERS)
    if len(context) > MAX_PASSAGES:
        raise InvalidInputError(
            f"context has {len(context)} passages; the limit is {MAX_PASSAGES}. Nothing was spent. Send the most "
            "relevant ones."
        )
    passages = [
        readable(f"context.{place}", text, minimum=0, maximum=MAX_PASSAGE_CHARACTERS)
        for place, text in enumerate(context)
    ]

    def prompt(lines: Sequence[str]) -> tuple[Message, ...]:
        return question_messages(question=asked, context="\n".join(lines))

    check_fits("question", prompt([_line(0, "")]), scaled_estimate(_MAX_QUESTION_TOKENS, counter), counter)
    budget = estimated_tokens(counter) - scaled_estimate(_ANSWER_TOKENS, counter)
    lines: list[str] = []
    cut = None
    for place, passage in enumerate(passages):

        def fits(text: str, place: int = place) -> bool:
            return count_prompt_tokens(prompt([*lines, _line(place, text)]), counter) <= budget

        kept = cut_to_fit(passage, fits)
        if kept or not passage:
            lines.append(_line(place, kept))
        if kept != passage:
            cut = place if kept else None
            break
    return QuestionPlan(
        messages=prompt(lines), passages_read=len(lines), passages_left_out=len(passages) - len(lines), passage_cut=cut
    )


def answer_question(
    model: Model, *, question: str, context: Sequence[str] = (), counter: TokenCounter | None = None
) -> QuestionResult:
    """Answer a question; from the context only, if there is one.

    The arguments are those of `plan_question`. Raises `InvalidInputError` for unusable input, `AnswerFormatError` for
    an unusable answer, and the model's errors.
    """
    counter = counter or offline_counter()
    plan = plan_question(question=question, context=context, counter=counter)
    answer_tokens = estimated_tokens(counter) - count_prompt_tokens(plan.messages, counter)
    completion = model.complete(plan.messages, max_completion_tokens=answer_tokens)
    warnings = ["The answer was cut off at its token limit."] if completion.truncated else []
    stated = _stated(completion.text)
    answer: str = stated["answer"].strip()
    used = _places(stated.get("passages"), plan.passages_read)
    answered = stated.get("answered") is not False
    if answered and context and not used:
        warnings.append("The model named no passage for its answer.")
    return QuestionResult(
        answer=answer,
        answered=answered,
        passages_used=used if answered else (),
        passages_left_out=plan.passages_left_out,
        passage_cut=plan.passage_cut,
        language=languages.detect(answer),
        warnings=tuple(warnings),
    )


def _stated(text: str) -> dict[str, Any]:
    """Return the model's answer object; if the model wrote prose instead, an object with the prose as `answer`.

    Raises `AnswerFormatError` if there is no answer.
    """
    stated = object_with(text, "answer") or {"answer": "" if "{" in text else text}
    if isinstance(stated["answer"], str) and stated["answer"].strip():
        return stated
    raise AnswerFormatError(
        "The model's reply has no answer in the requested format. Its tokens are charged. "
        "Use a model that follows instructions to answer in JSON (TRUEUP_MODEL_NAME)."
    )


def _line(place: int, passage: str) -> str:
    # Prompts number passages from 1, because models do so anyway.
    return json.dumps({"passage": place + 1, "text": passage}, ensure_ascii=False)


def _places(numbers: object, read: int) -> tuple[int, ...]:
    """Return the positions of the passages that the model names, without numbers that the prompt did not have."""
    listed = numbers if isinstance(numbers, list) else []
    places = {number - 1 for number in listed if type(number) is int and 1 <= number <= read}
    return tuple(sorted(places))
