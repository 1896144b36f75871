"""Question-and-answer pairs without a model: the most informative sentences, each with a question about it."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trueup.llm.languages import FUNCTION_WORDS, detect
from trueup.llm.model import Message
from trueup.llm.offline.questions import question_about
from trueup.llm.prompts import CONTEXT_CHARACTERS, Job, block
from trueup.llm.texts import cut_at_word, sentences, words

_DEFAULT_PAIRS = 5
_SHORTEST = 30
_ENDED = re.compile(r"[.!。！۔…][\"'”’»)\]]*$")
_MARKUP = re.compile(r"^(?:[#>*+•·–-]+|\d+[.)])\s+")
_ASKING = re.compile(r"[?؟]\s*$")
# A sentence that begins with one of these words depends on the sentence before it, and says little alone.
_LEANING = re.compile(
    r"^(?:it|this|these|that|those|they|he|she|however|also|then|but|and|or|so|for example"
    r"|bu|şu|o|ancak|ayrıca|ama|این|آن|آنها|همچنین|اما|ولی|سپس|هذا|هذه|ذلك|كما|لكن|ثم|وهذا)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    position: int
    sentence: str
    score: float


def qa_answer(messages: Sequence[Message], job: Job) -> str:
    """Return the JSON answer to a prompt of `trueup.llm.prompts.qa_messages`."""
    passage = block(messages, "passage")
    wanted = _number(job.arguments.get("pairs"))
    language = detect(passage)
    weights = _weights(passage, language)
    best = sorted(_candidates(passage, weights), key=lambda found: (-found.score, found.position))
    chosen: dict[str, _Candidate] = {}
    for candidate in best:
        question = question_about(candidate.sentence, language, weights)
        chosen.setdefault(question, candidate)
        if len(chosen) == wanted:
            break
    in_order = sorted(chosen.items(), key=lambda item: item[1].position)
    pairs = [_pair(question, found, best[0].score) for question, found in in_order]
    return json.dumps({"language": language, "pairs": pairs}, ensure_ascii=False)


def _number(argument: str | None) -> int:
    return int(argument) if argument and argument.isdecimal() else _DEFAULT_PAIRS


def _pair(question: str, found: _Candidate, top: float) -> dict[str, object]:
    return {
        "question": question,
        "answer": found.sentence,
        "context": found.sentence,
        "confidence": round(0.5 + 0.4 * found.score / top, 2) if top > 0 else 0.5,
    }


def _weights(passage: str, language: str) -> Counter[str]:
    """Return how often the passage uses each content word. Frequent words show its subject."""
    stop = FUNCTION_WORDS.get(language, frozenset())
    return Counter(word for word in words(passage) if len(word) > 2 and word not in stop)


def _candidates(passage: str, weights: Counter[str]) -> list[_Candidate]:
    found = []
    for position, raw in enumerate(sentences(passage)):
        sentence = cut_at_word(_MARKUP.sub("", raw), CONTEXT_CHARACTERS)
        if len(sentence) < _SHORTEST or _ASKING.search(sentence):
            continue
        score = _score(sentence, weights, ended=bool(_ENDED.search(raw)))
        found.append(_Candidate(position=position, sentence=sentence, score=score))
    return found


def _score(sentence: str, weights: Counter[str], *, ended: bool) -> float:
    """Return a score of a sentence's information: words and figures raise it; dependence and a missing end lower it."""
    content = {word for word in words(sentence) if word in weights}
    if not content:
        return 0.0
    score = sum(min(weights[word], 5) for word in content) / (len(content) + 2)
    score += 0.4 if any(character.isdecimal() for character in sentence) else 0.0
    score += 0.3 if 60 <= len(sentence) <= 200 else 0.0
    if _LEANING.match(sentence):
        score *= 0.5
    return score if ended else score * 0.4
