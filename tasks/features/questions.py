"""Task `trueup.ask_question`: answer a question, from passages of context if some are given."""

from collections.abc import Mapping
from typing import Any

from trueup.accounts.user_ids import UserId
from trueup.features import questions
from trueup.llm.model import Model
from trueup.llm.providers import counter_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.metered import metered_task


def estimate_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the specification's 1500, scaled up for models without an exact token counter.

    Raises `InvalidInputError` for input that the task would refuse.
    """
    counter = counter_from_settings(get_settings())
    questions.plan_question(question=arguments["question"], context=arguments["context"], counter=counter)
    return questions.estimated_tokens(counter)


@metered_task(
    name="trueup.ask_question", feature_name="Ask Question", section="knowledge_qa", estimated_tokens=estimate_tokens
)
def ask_question(
    model: Model,
    user_id: UserId,
    question: str,
    context: list[str] = [],  # noqa: B006 - Celery and pydantic copy it
) -> questions.QuestionResult:
    """Return the answer to a question.

    `context`: passages to answer from, the most relevant first. Without any, the model answers from its own knowledge.
    """
    counter = counter_from_settings(get_settings())
    return questions.answer_question(model, question=question, context=context, counter=counter)
