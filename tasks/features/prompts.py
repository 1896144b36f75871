"""Task `trueup.generate_prompt`: write a better prompt from a business's draft."""

from collections.abc import Mapping
from typing import Any

from trueup.accounts.user_ids import UserId
from trueup.features import enhancement
from trueup.llm.model import Model
from trueup.llm.providers import counter_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.metered import metered_task


def estimate_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the specification's 700, or more for a draft that does not fit it.

    Raises `InvalidInputError` for input that the task would refuse.
    """
    plan = enhancement.plan_enhancement(
        prompt=arguments["prompt"], business=arguments["business"], counter=counter_from_settings(get_settings())
    )
    return plan.estimated_tokens


@metered_task(
    name="trueup.generate_prompt",
    feature_name="Prompt Enhancement",
    section="prompt_generation",
    estimated_tokens=estimate_tokens,
)
def generate_prompt(
    model: Model, user_id: UserId, prompt: str, business: dict[str, Any] | None = None
) -> enhancement.PromptResult:
    """Return a better prompt. `prompt`: the draft. `business`: as in `trueup.reply_to_message`."""
    counter = counter_from_settings(get_settings())
    return enhancement.enhance_prompt(model, prompt=prompt, business=business, counter=counter)
