"""Task `trueup.generate_qa`: write question-and-answer pairs from a text."""

from collections.abc import Mapping
from typing import Any

from trueup.accounts.user_ids import UserId
from trueup.features import qa
from trueup.llm.model import Model
from trueup.llm.providers import counter_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.metered import metered_task


def estimate_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the most that the task's plan can cost.

    Raises `InvalidInputError` for input that the task would refuse.
    """
    return qa.estimate_tokens(
        arguments["text"],
        arguments["max_pairs"],
        page_title=arguments["page_title"],
        counter=counter_from_settings(get_settings()),
    )


@metered_task(
    name="trueup.generate_qa", feature_name="Q&A Generator", section="knowledge_qa", estimated_tokens=estimate_tokens
)
def generate_qa(model: Model, user_id: UserId, text: str, page_title: str = "", max_pairs: int = 10) -> qa.QaResult:
    """Return question-and-answer pairs in the text's own language.

    `text`: 100 characters or more. `max_pairs`: 1 to 50. Raises `InvalidInputError` before any token is held.
    """
    counter = counter_from_settings(get_settings())
    return qa.generate_qa(model, text=text, page_title=page_title, max_pairs=max_pairs, counter=counter)
