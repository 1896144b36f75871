"""Question-and-answer pairs from a text: passages, prompts with their costs, the estimate and the generation.

The estimate and the work use the same plan."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trueup.errors import AnswerFormatError, HoldExhaustedError, InvalidInputError
from trueup.features.answers import objects_under, scalar_under, share_of, text_of
from trueup.llm import languages
from trueup.llm.model import Message, Model
from trueup.llm.prompts import ANSWER_CHARACTERS, CONTEXT_CHARACTERS, QUESTION_CHARACTERS, qa_messages
from trueup.llm.texts import cut_at_word, fold, paragraph_spans, readable, sentence_spans, sentences, words
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter

Span = tuple[int, int]


def passages(text: str, *, tokens: int, counter: TokenCounter) -> list[str]:
    """Return slices of the text, verbatim, in order and complete, of at most about `tokens` tokens each."""
    found: list[str] = []
    begin = end = used = 0
    for (start, stop), cost in _pieces(text, tokens, counter):
        if used and used + cost > tokens:
            found.append(text[begin:end])
            used = 0
        if not used:
            begin = start
        end = stop
        used += cost
    if used:
        found.append(text[begin:end])
    return found


def _pieces(text: str, tokens: int, counter: TokenCounter) -> Iterator[tuple[Span, int]]:
    """Yield spans within the budget and their costs. A span above the budget is split further."""
    for paragraph in paragraph_spans(text):
        cost = _cost(text, paragraph, counter)
        if cost <= tokens:
            yield paragraph, cost
            continue
        for sentence in sentence_spans(text, *paragraph):
            cost = _cost(text, sentence, counter)
            if cost <= tokens:
                yield sentence, cost
            else:
                yield from _hard_pieces(text, sentence, tokens, counter)


def _hard_pieces(text: str, span: Span, tokens: int, counter: TokenCounter) -> Iterator[tuple[Span, int]]:
    """Split a span without sentences, at spaces if possible. Each piece is shrunk until it fits."""
    start, end = span
    while start < end:
        stop = end
        while (cost := _cost(text, (start, stop), counter)) > tokens and stop - start > 1:
            middle = start + max(1, (stop - start) * tokens // (cost + 1))
            space = text.rfind(" ", start + (middle - start) // 2, middle)
            stop = space if space > start else middle
        yield (start, stop), cost
        start = stop
        while start < end and text[start].isspace():
            start += 1


def _cost(text: str, span: Span, counter: TokenCounter) -> int:
    return max(1, counter.count(text[span[0] : span[1]]))


MIN_TEXT_CHARACTERS = 100
MAX_TEXT_CHARACTERS = 500_000
MAX_TITLE_CHARACTERS = 500
MAX_PAIRS = 50

PASSAGE_TOKENS = 1200
MAX_PASSAGE_TOKENS = 4000
# Tokens of the JSON syntax: for one pair, and for the answer around the pairs.
_PAIR_OVERHEAD_TOKENS = 40
_ANSWER_OVERHEAD_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """One model call: a passage, its prompt, and the costs in tokens. `pairs`: how many to request."""

    passage: str
    pairs: int
    messages: tuple[Message, ...]
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class QaPlan:
    """All model calls for one text."""

    chunks: tuple[PlannedChunk, ...]
    passages_left_out: int
    """Count of passages that are not read, because the text has more passages than requested pairs."""

    @property
    def estimated_tokens(self) -> int:
        return sum(chunk.prompt_tokens + chunk.answer_tokens for chunk in self.chunks)


def plan_qa(text: str, max_pairs: int, *, page_title: str = "", counter: TokenCounter | None = None) -> QaPlan:
    """Plan the model calls for at most `max_pairs` pairs. `counter` None: that of the o200k encoding.

    Raises `InvalidInputError` for an unusable text, title or number of pairs.
    """
    counter = counter or offline_counter()
    text, page_title, max_pairs = _checked(text, page_title, max_pairs)
    found = _passages(text, max_pairs, counter)
    kept = _evenly(found, max_pairs)
    chunks = []
    for passage, pairs in zip(kept, _spread(max_pairs, kept), strict=True):
        messages = qa_messages(passage=passage, page_title=page_title, pairs=pairs)
        chunks.append(
            PlannedChunk(
                passage=passage,
                pairs=pairs,
                messages=messages,
                prompt_tokens=count_prompt_tokens(messages, counter),
                answer_tokens=_answer_tokens(passage, pairs, counter),
            )
        )
    return QaPlan(chunks=tuple(chunks), passages_left_out=len(found) - len(kept))


def _checked(text: str, page_title: str, max_pairs: int) -> tuple[str, str, int]:
    if isinstance(max_pairs, bool) or not isinstance(max_pairs, int):
        raise InvalidInputError(f"max_pairs is {max_pairs!r}. Nothing was spent. Send a number from 1 to {MAX_PAIRS}.")
    if not 1 <= max_pairs <= MAX_PAIRS:
        raise InvalidInputError(f"max_pairs is {max_pairs}. Nothing was spent. Send a number from 1 to {MAX_PAIRS}.")
    title = readable("page_title", page_title, minimum=0, maximum=MAX_TITLE_CHARACTERS)
    body = readable("text", text, minimum=MIN_TEXT_CHARACTERS, maximum=MAX_TEXT_CHARACTERS)
    if not any(character.isalpha() for character in body):
        raise InvalidInputError("text has no letters. Nothing was spent. Send prose.")
    return body, " ".join(title.split()), max_pairs


def _passages(text: str, max_pairs: int, counter: TokenCounter) -> list[str]:
    """Cut the text into passages. For a long text with few pairs they are longer, so that all of them are read."""
    budget = PASSAGE_TOKENS
    found = passages(text, tokens=budget, counter=counter)
    while len(found) > max_pairs and budget < MAX_PASSAGE_TOKENS:
        budget = min(MAX_PASSAGE_TOKENS, budget * 2)
        found = passages(text, tokens=budget, counter=counter)
    return found


def _evenly(found: Sequence[str], most: int) -> list[str]:
    if len(found) <= most:
        return list(found)
    return [found[index * len(found) // most] for index in range(most)]


def _spread(max_pairs: int, kept: Sequence[str]) -> list[int]:
    """Distribute the pairs by the lengths of the passages: one each, the rest by the largest-remainder method."""
    shares = [len(passage) * (max_pairs - len(kept)) / sum(map(len, kept)) for passage in kept]
    pairs = [1 + math.floor(share) for share in shares]
    by_remainder = sorted(range(len(kept)), key=lambda index: shares[index] % 1, reverse=True)
    for index in by_remainder[: max_pairs - sum(pairs)]:
        pairs[index] += 1
    return pairs


def _answer_tokens(passage: str, pairs: int, counter: TokenCounter) -> int:
    """Return the limit of an answer: each pair at full length, at the passage's own tokens per character.

    Persian, for example, has more tokens per character than English.
    """
    density = max(0.25, counter.count(passage) / len(passage))
    characters = QUESTION_CHARACTERS + ANSWER_CHARACTERS + CONTEXT_CHARACTERS
    per_pair = math.ceil(density * characters) + _PAIR_OVERHEAD_TOKENS
    return _ANSWER_OVERHEAD_TOKENS + pairs * per_pair


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
    model: Model, *, text: str, page_title: str = "", max_pairs: int = 10, counter: TokenCounter | None = None
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
