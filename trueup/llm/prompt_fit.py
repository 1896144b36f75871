"""Cut texts to the token budget of a prompt, or refuse a text that can't be cut."""

from collections.abc import Callable, Sequence

from trueup.errors import InvalidInputError
from trueup.llm.model import Message
from trueup.llm.texts import cut_at_word
from trueup.llm.tokens import TokenCounter, count_prompt_tokens

CUT_MARK = " […]"


def longest_fitting(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest length up to `limit` that fits, by binary search. Length 0 counts as fitting."""
    found, beyond = 0, limit + 1
    while beyond - found > 1:
        middle = (found + beyond) // 2
        if fits(middle):
            found = middle
        else:
            beyond = middle
    return found


def cut_to_fit(text: str, fits: Callable[[str], bool]) -> str:
    """Return as much of the text as fits, cut at a word and marked with `CUT_MARK`; empty if no part fits."""
    if fits(text):
        return text
    length = longest_fitting(len(text), lambda length: fits(_marked(text, length)))
    return _marked(text, length)


def _marked(text: str, length: int) -> str:
    kept = cut_at_word(text, length)
    return kept + CUT_MARK if kept else ""


def check_fits(field: str, messages: Sequence[Message], budget: int, counter: TokenCounter) -> None:
    """Raise `InvalidInputError` if the prompt exceeds the budget with nothing else in it, as `field` is never cut.

    `messages`: the prompt with only this field. `budget`: tokens.
    """
    excess = count_prompt_tokens(messages, counter) - budget
    if excess > 0:
        raise InvalidInputError(
            f"{field} is {excess} tokens too long for the task's estimate. Nothing was spent. Shorten it."
        )
