"""The metered model client: it spends only from the running task's hold, and charges every call.

The hold is in a context variable, set by the metered base task for as long as its body runs. Code that calls a task's
body in any other way finds no hold, and can't spend.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from ai.model import Completion, Message, Provider
from billing import db
from billing.charges import MAX_LOG_TOKENS, Charge, Usage, find_answer, record_charge
from billing.errors import HoldExhaustedError, NoHoldError, ServiceUnavailableError
from billing.holds import Hold
from billing.settings import Settings

logger = logging.getLogger(__name__)

_running: ContextVar["RunningHold | None"] = ContextVar("trueup_running_hold", default=None)

# A charge stands for money spent: while the database is away it is tried again, waiting this long in between.
CHARGE_RETRY_DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10)


class RunningHold:
    """The hold of the task that runs now, and what it has left; one per attempt of a task."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.tokens_left = hold.tokens_left
        self.calls = 0


def running_task_id() -> str | None:
    """Return the id of the metered task that runs in this context; None when none does."""
    running = _running.get()
    return running.hold.task_id if running else None


@contextmanager
def spending_from(hold: Hold) -> Iterator[RunningHold]:
    """Let model calls in this context spend from the hold."""
    running = RunningHold(hold)
    token = _running.set(running)
    try:
        yield running
    finally:
        _running.reset(token)


class MeteredModel:
    """A `Model` that asks a provider for at most what the hold covers, and charges what it really cost.

    A redelivered task repeats its calls in the same order: those it has already paid for are answered from their
    charges instead of being bought again.
    """

    def __init__(self, provider: Provider, settings: Settings) -> None:
        self._provider = provider
        self._settings = settings

    @property
    def tokens_left(self) -> int:
        """Count of tokens the running task may still spend. Raises `NoHoldError` outside of one."""
        return _running_hold().tokens_left

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `NoHoldError` outside a metered task, `HoldExhaustedError` when the hold does not cover the prompt and
        one token of answer, `ProviderError` when the provider fails, `ServiceUnavailableError` when the usage could not
        be written.
        """
        running = _running_hold()
        running.calls += 1
        call_key = f"{running.calls}:{_fingerprint(self._settings.model_name, messages)}"
        if running.hold.attempt > 1:
            paid = db.retrying(lambda connection: find_answer(connection, running.hold, call_key))
            if paid is not None:
                return Completion(**paid)
        limit = self._affordable(running, messages)
        if max_completion_tokens is not None:
            limit = min(limit, max_completion_tokens)
        completion = self._provider.complete(messages, max_completion_tokens=limit)
        charge = self._charge(running.hold, call_key, completion)
        running.tokens_left = charge.tokens_left
        _warn_if_uncovered(running.hold, call_key, charge)
        return completion

    def _affordable(self, running: RunningHold, messages: Sequence[Message]) -> int:
        """Return how many tokens of answer the hold covers after the prompt."""
        prompt_tokens = self._provider.count_prompt_tokens(messages)
        limit = running.tokens_left - prompt_tokens
        if limit < 1:
            raise HoldExhaustedError(
                f"{running.hold.feature_name}: {running.tokens_left} tokens are left of the hold, the prompt alone "
                f"takes {prompt_tokens}. Nothing was spent on this call. Raise the task's estimate, or send it less text."
            )
        return limit

    def _charge(self, hold: Hold, call_key: str, completion: Completion) -> Charge:
        usage = _usage(completion)
        metadata = {
            "task_id": hold.task_id,
            "feature": hold.feature_name,
            "call": call_key,
            "usage_reported": completion.usage_reported,
        }
        answer = self._storable(completion)
        for delay in (*CHARGE_RETRY_DELAYS_SECONDS, None):
            try:
                return db.retrying(
                    lambda connection: record_charge(
                        connection, hold, call_key=call_key, usage=usage, metadata=metadata, answer=answer
                    )
                )
            except ServiceUnavailableError:
                if delay is None:
                    logger.exception(
                        "usage not recorded: task %s, user %s, call %s, %d tokens",
                        hold.task_id,
                        hold.user_id,
                        call_key,
                        usage.total_tokens,
                    )
                    raise
                time.sleep(delay)
        raise AssertionError("unreachable: the last try returns or raises")

    def _storable(self, completion: Completion) -> dict[str, Any] | None:
        """Return the answer to keep for a redelivery, or None if the settings or its size forbid."""
        if not self._settings.store_answers:
            return None
        answer = asdict(completion)
        size = len(json.dumps(answer).encode())
        # PostgreSQL's jsonb holds any text but the NUL character.
        return answer if size <= self._settings.stored_answer_max_bytes and "\x00" not in completion.text else None


def _running_hold() -> RunningHold:
    running = _running.get()
    if running is None:
        raise NoHoldError(
            "A model was called outside a metered task: no tokens are held for it, so nothing was spent. "
            "Call the task itself (delay, apply_async, or directly), not its run method."
        )
    return running


def _fingerprint(model_name: str, messages: Sequence[Message]) -> str:
    """Identify a request: a changed one at the same place in the task is a new call.

    The limit on its answer is left out: it follows from what the hold has left, which a redelivery finds changed.
    """
    request = [model_name, *([message.role, message.content] for message in messages)]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]


def _usage(completion: Completion) -> Usage:
    return Usage(
        prompt_tokens=min(completion.prompt_tokens, MAX_LOG_TOKENS),
        completion_tokens=min(completion.completion_tokens, MAX_LOG_TOKENS),
        total_tokens=min(completion.total_tokens, MAX_LOG_TOKENS),
        response_time_ms=completion.response_time_ms,
        model_name=completion.model_name,
    )


def _warn_if_uncovered(hold: Hold, call_key: str, charge: Charge) -> None:
    if charge.recorded and (charge.tokens_over or charge.late):
        logger.warning(
            "charge %s of task %s (user %s): %d tokens over its hold%s",
            call_key,
            hold.task_id,
            hold.user_id,
            charge.tokens_over,
            ", late" if charge.late else "",
        )
