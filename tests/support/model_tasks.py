"""Metered tasks for the tests. A worker registers them with `-I tests.support.model_tasks`."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import current_task, shared_task
from celery.exceptions import Ignore
from sqlalchemy import text

from tests.support.work import hold_tokens
from trueup.accounts.user_ids import UserId
from trueup.billing.token_hold import ai_tokens
from trueup.database.engine import connect
from trueup.errors import ProviderError, TrueupError
from trueup.gate.holds import expire_holds
from trueup.llm.model import Message, Model
from trueup.llm.running import running_hold
from trueup.tasks import metered_task

WORD = "token "


def ask(model: Model, words: int) -> int:
    """Make one model call of about that many words. Returns its tokens."""
    return model.complete([Message(role="user", content=WORD * words)], max_completion_tokens=20).total_tokens


@metered_task(name="test.spend", feature_name="Spender", section="chat", estimated_tokens=100)
def spend(model: Model, user_id: UserId, words: int = 10, calls: int = 1, seconds: float = 0) -> int:
    """Spend on some calls, then run for some time. Returns the tokens spent."""
    spent = sum(ask(model, words + call) for call in range(calls))
    time.sleep(seconds)
    return spent


@metered_task(name="test.fail", feature_name="Failer", section="chat", estimated_tokens=100)
def fail(model: Model, user_id: UserId) -> None:
    """Spend, then fail."""
    ask(model, 10)
    raise RuntimeError("after spending")


@metered_task(name="test.ignore", feature_name="Ignorer", section="chat", estimated_tokens=100)
def ignore(model: Model, user_id: UserId) -> None:
    raise Ignore


@metered_task(
    name="test.measured",
    feature_name="Measured",
    section="chat",
    estimated_tokens=lambda arguments: arguments["tokens"],
)
def measured(model: Model, user_id: UserId, tokens: int | None) -> Any:
    """Hold the tokens that the caller gives. None: no hold."""
    return getattr(model, "tokens_left", None) if tokens is not None else ask(model, 1)


@metered_task(name="test.answering", feature_name="Answering", section="chat", estimated_tokens=100, on_denied="return")
def answering(model: Model, user_id: UserId) -> str:
    return "ran"


@metered_task(name="test.outer", feature_name="Outer", section="chat", estimated_tokens=100)
def outer(model: Model, user_id: UserId) -> list[int]:
    """Spend, and call another metered task directly."""
    return [ask(model, 10), spend(user_id=user_id)]


@metered_task(name="test.uploading", feature_name="Uploading", section="chat", estimated_tokens=100)
def uploading(model: Model, user_id: UserId) -> str:
    """Hold tokens of its own for a request that other tasks make too."""
    with ai_tokens(user_id, 50, key="upload"):
        return "uploaded"


@metered_task(
    name="test.retrying",
    feature_name="Retrying",
    section="chat",
    estimated_tokens=100,
    autoretry_for=(Exception,),
    retry_kwargs={"max_retries": 1, "countdown": 0},
)
def retrying(model: Model, user_id: UserId) -> int:
    ask(model, 10)
    raise ValueError("always")


def reject(model: Model, good_at: int, seconds: float = 0) -> int:
    """Reject the answer until the retry of that number, then take some time."""
    spent = ask(model, 10)
    if current_task.request.retries < good_at:
        raise ValueError("this answer is no good")
    time.sleep(seconds)
    return spent


RETRIED_AT_ONCE: dict[str, Any] = {
    "section": "chat",
    "estimated_tokens": 200,
    "autoretry_for": (ValueError,),
    "retry_kwargs": {"max_retries": 3, "countdown": 0},
    "max_retries": 3,
    "default_retry_delay": 0,
}


@metered_task(name="test.picky", feature_name="Picky", **RETRIED_AT_ONCE)
def picky(model: Model, user_id: UserId, good_at: int, seconds: float = 0) -> int:
    return reject(model, good_at, seconds)


@metered_task(name="test.replaying", feature_name="Replaying", replay="always", **RETRIED_AT_ONCE)
def replaying(model: Model, user_id: UserId, good_at: int) -> int:
    return reject(model, good_at)


@metered_task(name="test.changing", feature_name="Changing", section="chat", estimated_tokens=200)
def changing(model: Model, user_id: UserId, words: int) -> int:
    """Retry with fewer words until there are few."""
    spent = ask(model, words)
    if words > 10:
        raise current_task.retry(kwargs={"user_id": user_id, "words": words - 1}, countdown=0)
    return spent


@metered_task(
    name="test.failing_call", feature_name="Failing call", section="chat", estimated_tokens=200, default_retry_delay=0
)
def failing_call(model: Model, user_id: UserId) -> int:
    """Spend, then fail as a provider that may be better soon; a retry goes on."""
    spent = ask(model, 10)
    if current_task.request.retries == 0:
        raise ProviderError("busy", retryable=True)
    return spent + ask(model, 11)


@metered_task(name="test.calling", feature_name="Calling", section="chat", estimated_tokens=100)
def calling(model: Model, user_id: UserId, words: list[int]) -> list[int]:
    """Call another metered task directly from several threads, once for each count of words."""
    with ThreadPoolExecutor(4) as pool:
        return [
            future.result()
            for future in [pool.submit(copy_context().run, spend, user_id=user_id, words=count) for count in words]
        ]


@metered_task(
    name="test.exact", feature_name="Exact", section="chat", estimated_tokens=lambda arguments: arguments["tokens"]
)
def exact(model: Model, user_id: UserId, tokens: int) -> int:
    """Hold the tokens that the caller gives, and spend the same on every run."""
    return ask(model, 10)


@metered_task(
    name="test.limited", feature_name="Limited", section="chat", estimated_tokens=100, soft_time_limit=1, time_limit=2
)
def limited(model: Model, user_id: UserId) -> None:
    """Spend, and then ignore the soft time limit."""
    ask(model, 10)
    with suppress(SoftTimeLimitExceeded):
        time.sleep(20)
    time.sleep(20)


@metered_task(
    name="test.soft", feature_name="Soft", section="chat", estimated_tokens=100, soft_time_limit=1, time_limit=30
)
def soft(model: Model, user_id: UserId) -> None:
    """Spend, and then exceed the soft time limit."""
    ask(model, 10)
    time.sleep(20)


@metered_task(name="test.expiring", feature_name="Expiring", section="chat", estimated_tokens=100)
def expiring(model: Model, user_id: UserId) -> int:
    """Spend, and continue after the hold has expired."""
    ask(model, 10)
    with connect() as connection:
        expire_holds(connection, now=datetime.now(UTC) + timedelta(days=1))
    return ask(model, 11)


@metered_task(
    name="test.overtaken",
    feature_name="Overtaken",
    section="chat",
    estimated_tokens=100,
    autoretry_for=(ValueError,),
    retry_kwargs={"max_retries": 1, "countdown": 0},
)
def overtaken(model: Model, user_id: UserId, goes_on: bool = False, library: bool = False) -> None:
    """Wait until another delivery has the hold. Then continue, or ask for a retry.

    `library`: call the model through a library that raises errors of its own.
    """
    hold = running_hold()
    assert hold is not None
    with connect() as connection:
        connection.execute(text("UPDATE trueup.hold SET lease_until = '-infinity'"))
        hold_tokens(connection, user_id, 100, task=hold.task_id, request=hold.request, lease=60)
    if goes_on:
        try:
            ask(model, 10)
        except TrueupError as error:
            if library:
                raise ConnectionError("the library could not connect") from error
            raise
    raise ValueError("after standing still")


@metered_task(name="test.exit", feature_name="Exit", section="chat", estimated_tokens=100, max_retries=1)
def leave(model: Model, user_id: UserId) -> None:
    """Spend, then end the process."""
    ask(model, 10)
    raise SystemExit(3)


@metered_task(name="test.replaced", feature_name="Replaced", section="chat", estimated_tokens=100)
def replaced(model: Model, user_id: UserId, successor: UserId) -> None:
    """Spend, then replace this task by another."""
    ask(model, 10)
    current_task.replace(spend.si(user_id=successor, words=20))


@shared_task(name="test.total")
def total(figures: list[int]) -> int:
    """Add up the tokens that the tasks of a chord spent."""
    return sum(figures)
