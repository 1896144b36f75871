"""Task `trueup.reply_to_message`: answer a customer's message in a chat."""

from collections.abc import Mapping
from typing import Any

from trueup.accounts.user_ids import UserId
from trueup.features import messages
from trueup.llm.model import Model
from trueup.llm.providers import counter_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.metered import metered_task


def estimate_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the specification's 1500, scaled up for models without an exact token counter.

    Raises `InvalidInputError` for input that the task would refuse.
    """
    counter = counter_from_settings(get_settings())
    messages.plan_reply(
        message=arguments["message"], history=arguments["history"], business=arguments["business"], counter=counter
    )
    return messages.estimated_tokens(counter)


@metered_task(
    name="trueup.reply_to_message", feature_name="Message Integration", section="chat", estimated_tokens=estimate_tokens
)
def reply_to_message(
    model: Model,
    user_id: UserId,
    message: str,
    history: list[dict[str, Any]] = [],  # noqa: B006 - Celery and pydantic copy it
    business: dict[str, Any] | None = None,
) -> messages.ReplyResult:
    """Return the answer to a customer's message.

    `history`: the earlier messages, oldest first: {"sender": "customer" or "business", "text": …}. `business`: name,
    description, persona, instructions and language, each optional.
    """
    counter = counter_from_settings(get_settings())
    return messages.reply_to_message(model, message=message, history=history, business=business, counter=counter)
