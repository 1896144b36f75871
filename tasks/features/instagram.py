"""Task `trueup.send_instagram_dm`: answer an Instagram comment with a direct message."""

from collections.abc import Mapping
from typing import Any

from celery import current_task

from trueup.accounts.user_ids import UserId
from trueup.features.instagram import direct_message
from trueup.features.instagram.comments import action_config, comment_event
from trueup.features.instagram.effects import Outbox
from trueup.features.instagram.graph import GraphClient
from trueup.llm.model import Model
from trueup.llm.providers import counter_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.metered import metered_task


def estimate_tokens(arguments: Mapping[str, Any]) -> int | None:
    """Return the specification's 1000 for PRODUCT messages; None for STATIC messages and own comments, which use no AI.

    None means that the call is not gated. Raises `InvalidInputError` for input that the task would refuse.
    """
    event, config = comment_event(arguments["event"]), action_config(arguments["config"])
    if config.mode == "STATIC" or event.is_own:
        return None
    return direct_message.estimated_tokens(counter_from_settings(get_settings()))


@metered_task(
    name="trueup.send_instagram_dm",
    feature_name="Instagram Product DM",
    section="marketing_workflow",
    estimated_tokens=estimate_tokens,
)
def send_instagram_dm(
    model: Model, user_id: UserId, event: dict[str, Any], config: dict[str, Any]
) -> direct_message.DmResult:
    """Answer the one comment of a webhook payload by direct message and, if configured, publicly.

    `event`: Instagram's `comments` payload. `config`: the action's configuration. In mode PRODUCT the model writes the
    message and the task is gated; mode STATIC uses no AI and is not gated.
    """
    settings = get_settings()
    outbox = Outbox(user_id=user_id, task_id=current_task.request.id, resend_unknown=settings.resend_unknown_messages)
    with GraphClient.from_settings(settings) as graph:
        return direct_message.send_instagram_dm(
            model,
            event=comment_event(event),
            config=action_config(config),
            graph=graph,
            outbox=outbox,
            counter=counter_from_settings(settings),
        )
