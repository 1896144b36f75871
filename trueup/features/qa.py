"""Question-and-answer pairs from a text: the estimate and the generation."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trueup.errors import AnswerFormatError, HoldExhaustedError
from trueup.features.answers import objects_under, scalar_under, share_of, text_of
from trueup.features.qa_plan import PlannedChunk, plan_qa
from trueup.llm import languages
from trueup.llm.model import Model
from trueup.llm.texts import cut_at_word, fold, sentences, words
from trueup.llm.tokens import TokenCounter

_MAX_QUESTION_CHARACTERS = 500
_MAX_ANSWER_CHARACTERS = 4000
_MAX_CONTEXT_CHARACTERS = 1000
_UNSTATED_CONFIDENCE = 0.5
_NOT_WORD = re.compile(r"[\W_]+")
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,4})?")


class QaPair(BaseModel):
    """A question, its answer, and the excerpt of the text that the answer comes from."""

    model_config = ConfigDict(frozen=True)

    question: str
    answer: str
    context: str
    """An excerpt of the text, verbatim."""
    confidence: float = Field(ge=0, le=1)
    language: str
    """The code of the pair's language, such as "fa"; "und" if it was not recognised."""


class QaResult(BaseModel):
    """The pairs from a text. `complete` False: the hold was exhausted before the end of the text."""

    model_config = ConfigDict(frozen=True)

    pairs: tuple[QaPair, ...]
    requested_pairs: int
    language: str
    complete: bool
    chunks_planned: int
    chunks_done: int
    warnings: tuple[str, ...] = ()


def estimate_tokens(text: str, max_pairs: int, *, page_title: str = "", counter: TokenCounter | None = None) -> int:
    """Return the tokens that `generate_qa` may spend on the same input: the sum of all prompts and answer limits.

    `max_pairs`: 1 to 50. `counter` None: that of the o200k encoding. Raises `InvalidInputError` as `generate_qa` does.
    """
    return plan_qa(text, max_pairs, page_title=page_title, counter=counter).estimated_tokens


def generate_qa(
    model: Model,
    *,
    text: str,
    page_title: str = "",
    max_pairs: int = 10,
    counter: TokenCounter | None = None,
) -> QaResult:
    """Generate at most `max_pairs` pairs from a text of 100 or more characters, passage by passage.

    The arguments are those of `estimate_tokens`. Raises `InvalidInputError` for unusable input, `HoldExhaustedError` or
    `AnswerFormatError` if there are no pairs at all, `ProviderError` if the provider fails.
    """
    plan = plan_qa(text, max_pairs, page_title=page_title, counter=counter)
    work = _Work()
    for chunk in plan.chunks:
        try:
            work.add(_ask(model, chunk))
        except AnswerFormatError as error:
            work.skip(error)
        except HoldExhaustedError:
            if not work.pairs:
                raise
            work.stop(len(plan.chunks))
            break
    if work.unusable == len(plan.chunks):
        raise AnswerFormatError(
            "No answer of the model had the requested format, so there are no pairs. The tokens are charged. "
            "Use a model that follows instructions to answer in JSON (TRUEUP_MODEL_NAME)."
        )
    if plan.passages_left_out:
        work.warnings.append(
            f"{plan.passages_left_out} parts of the text were not read, because it is too long for {max_pairs} pairs. "
            "Request more pairs, or send the text in parts."
        )
    return work.result(text, max_pairs, planned=len(plan.chunks))


@dataclass(kw_only=True)
class _Work:
    """The results of the chunks so far."""

    pairs: list[QaPair] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    done: int = 0
    unusable: int = 0

    def add(self, made: Sequence[QaPair]) -> None:
        """Add the pairs whose questions are new."""
        self.done += 1
        for pair in made:
            key = _NOT_WORD.sub(" ", fold(pair.question)).strip()
            if key not in self.asked:
                self.asked.add(key)
                self.pairs.append(pair)

    def skip(self, error: AnswerFormatError) -> None:
        self.done += 1
        self.unusable += 1
        self.warnings.append(f"Part {self.done} of the text gave no pairs: {error}")

    def stop(self, planned: int) -> None:
        self.warnings.append(
            f"The held tokens were used up after {self.done} of {planned} parts of the text. "
            "The pairs so far are returned. Add tokens and run the task again for the rest."
        )

    def result(self, text: str, max_pairs: int, *, planned: int) -> QaResult:
        return QaResult(
            pairs=tuple(self.pairs[:max_pairs]),
            requested_pairs=max_pairs,
            language=_main_language(self.pairs, text),
            complete=self.done == planned,
            chunks_planned=planned,
            chunks_done=self.done,
            warnings=tuple(self.warnings),
        )


def _ask(model: Model, chunk: PlannedChunk) -> list[QaPair]:
    completion = model.complete(chunk.messages, max_completion_tokens=chunk.answer_tokens)
    found = objects_under(completion.text, "pairs")
    if found is None:
        cut = " It was cut off before its first pair." if completion.truncated else ""
        raise AnswerFormatError(f"the answer has no list of pairs.{cut}")
    stated = scalar_under(completion.text, "language")
    made = [pair for item in found if (pair := _pair(item, chunk.passage, stated))]
    if found and not made:
        raise AnswerFormatError("no pair in the answer has a question and an answer.")
    return made[: chunk.pairs]


def _pair(item: dict[str, Any], passage: str, stated_language: object) -> QaPair | None:
    question = cut_at_word(text_of(item.get("question")), _MAX_QUESTION_CHARACTERS)
    answer = cut_at_word(text_of(item.get("answer")), _MAX_ANSWER_CHARACTERS)
    if not question or not answer:
        return None
    confidence = share_of(item.get("confidence"), default=_UNSTATED_CONFIDENCE)
    context = _excerpt(text_of(item.get("context")), passage)
    if context is None:
        # The model's context is not in the passage. Use the most similar sentence, and lower the confidence.
        context = _nearest_sentence(f"{question} {answer}", passage)
        confidence = min(confidence, _UNSTATED_CONFIDENCE)
    return QaPair(
        question=question,
        answer=answer,
        context=context[:_MAX_CONTEXT_CHARACTERS],
        confidence=round(confidence, 2),
        language=_language(f"{question} {answer}", stated_language),
    )


def _excerpt(quoted: str, passage: str) -> str | None:
    """Return the passage's text for a quotation, whose spaces and letter case may differ; None if it is not there."""
    if not quoted:
        return None
    if quoted in passage:
        return quoted
    pattern = r"\s+".join(re.escape(part) for part in quoted.strip("…. \"'«»“”").split())
    match = re.search(pattern, passage, re.IGNORECASE) if pattern else None
    return match.group() if match else None


def _nearest_sentence(statement: str, passage: str) -> str:
    wanted = set(words(statement))
    return max(sentences(passage), key=lambda sentence: len(wanted & set(words(sentence))))


def _language(text: str, stated: object) -> str:
    """Return the detected language of the text, or the stated one if the detection does not know that language."""
    detected = languages.detect(text)
    if not isinstance(stated, str) or not _LANGUAGE_CODE.fullmatch(stated):
        return detected
    other = stated not in languages.FUNCTION_WORDS and detected in ("en", languages.UNKNOWN)
    return stated if other else detected


def _main_language(pairs: Sequence[QaPair], text: str) -> str:
    spoken = Counter(pair.language for pair in pairs)
    return spoken.most_common(1)[0][0] if spoken else languages.detect(text)
