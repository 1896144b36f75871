"""How much of a text there is room for."""

from collections.abc import Callable, Sequence

from trueup.errors import InvalidInputError
from trueup.llm.model import Message
from trueup.llm.texts import cut_at_word
from trueup.llm.tokens import TokenCounter, count_prompt_tokens

CUT_MARK = " […]"


def longest_fitting(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest length up to `most` that fits, by halving; 0 is taken to fit."""
    found, beyond = 0, most + 1
    while beyond - found > 1:
        middle = (found + beyond) // 2
        if fits(middle):
            found = middle
        else:
            beyond = middle
    return found


def cut_to_fit(text: str, fits: Callable[[str], bool]) -> str:
    """Return as much of the text as fits, ended at a word and marked as cut; empty when nothing of it does."""
    if fits(text):
        return text
    length = longest_fitting(len(text), lambda length: fits(_marked(text, length)))
    return _marked(text, length)


def _marked(text: str, length: int) -> str:
    kept = cut_at_word(text, length)
    return kept + CUT_MARK if kept else ""


def check_fits(field: str, messages: Sequence[Message], budget: int, counter: TokenCounter) -> None:
    """Raise `InvalidInputError` when a prompt that holds nothing but this field, and so can't be cut, is too large."""
    excess = count_prompt_tokens(messages, counter) - budget
    if excess > 0:
        raise InvalidInputError(
            f"{field} is {excess} tokens too long for what the task may cost. Shorten it; nothing was spent."
        )
