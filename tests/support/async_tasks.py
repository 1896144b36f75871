"""Metered tasks with `async def` bodies, registered by a worker with `-I tests.support.async_tasks`."""

import asyncio
from typing import Any

from celery import current_task

from tests.support.model_tasks import WORD, spend
from trueup.accounts.user_ids import UserId
from trueup.llm.model import AsyncModel, Message
from trueup.llm.running import running_hold
from trueup.tasks import metered_task


async def ask(model: AsyncModel, words: int) -> int:
    """Make one model call of about that many words. Returns its tokens."""
    prompt = [Message(role="user", content=WORD * words)]
    return (await model.acomplete(prompt, max_completion_tokens=20)).total_tokens


@metered_task(name="test.async_spend", feature_name="Async", section="chat", estimated_tokens=500)
async def async_spend(model: AsyncModel, user_id: UserId, calls: int = 1) -> dict[str, Any]:
    """Make some calls at once. Returns their tokens, and what this body and a task that it started see."""

    async def seen() -> Any:
        hold = running_hold()
        return [hold and hold.task_id, current_task and current_task.request.id]

    spent = await asyncio.gather(*(ask(model, 10 + call) for call in range(calls)))
    return {
        "spent": sum(spent),
        "seen": [await seen(), await asyncio.create_task(seen())],
        "loop": id(asyncio.get_running_loop()),
    }


@metered_task(
    name="test.async_slow", feature_name="Slow", section="chat", estimated_tokens=500, soft_time_limit=2, time_limit=60
)
async def async_slow(model: AsyncModel, user_id: UserId, partly: bool = False) -> str:
    """Spend, then take longer than the soft time limit. `partly`: return when it is cancelled."""
    await ask(model, 10)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        if partly:
            return "a part"
        raise
    return "all"


@metered_task(name="test.async_exit", feature_name="Exit", section="chat", estimated_tokens=500, max_retries=0)
async def async_leave(model: AsyncModel, user_id: UserId) -> None:
    """Spend, then end the process."""
    await ask(model, 10)
    raise SystemExit(3)


@metered_task(name="test.async_outer", feature_name="Outer", section="chat", estimated_tokens=500)
async def async_outer(model: AsyncModel, user_id: UserId) -> list[int]:
    """Call a task of each kind directly, in the middle of this one."""
    return [await ask(model, 30), spend(user_id=user_id), async_spend(user_id=user_id)["spent"]]
