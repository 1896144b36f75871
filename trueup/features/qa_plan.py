"""The prompts for a text's question-and-answer pairs, and their costs. The estimate and the work use the same plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trueup.errors import InvalidInputError
from trueup.features.chunks import passages
from trueup.llm.model import Message
from trueup.llm.prompts import ANSWER_CHARACTERS, CONTEXT_CHARACTERS, QUESTION_CHARACTERS, qa_messages
from trueup.llm.texts import readable
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter

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
