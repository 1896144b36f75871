"""The metered model client: it spends only from the running task's hold, and charges every call.

The hold is in a context variable, set by the metered base task for as long as its body runs. Code that calls a task's
body in any other way finds no hold, and can't spend.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from trueup.database.retry import PASSING, once, retry_until_recorded, retrying
from trueup.errors import (
    HoldOvertakenError,
    NoHoldError,
    ProviderError,
)
from trueup.gate.holds import Hold
from trueup.gate.provider_calls import end_call, extend_hold
from trueup.llm.model import Completion, CompletionStream, Message, Provider
from trueup.llm.output_cap import cap_output
from trueup.settings.settings import Settings
from trueup.usage.charges import Charge, Usage, find_answer, record_charge

logger = logging.getLogger(__name__)

_running: ContextVar["RunningHold | None"] = ContextVar("trueup_running_hold", default=None)


class RunningHold:
    """The hold of the task that runs now, and what it has left; one per attempt of a task."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.tokens_left = hold.tokens_left
        self.streams: set[CompletionStream] = set()  # those that run; none must end uncharged
        self.is_lost = False  # set when a charge came late: then the hold is not this attempt's any more


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call that may be made: at most `limit` tokens of answer. `paid`: it was, by an earlier attempt."""

    running: RunningHold
    key: str
    limit: int
    paid: Completion | None = None


def running_hold() -> Hold | None:
    """Return the hold of the metered task that runs in this context; None when none does."""
    running = _running.get()
    return running.hold if running else None


@contextmanager
def spending_from(hold: Hold) -> Iterator[RunningHold]:
    """Let model calls in this context spend from the hold."""
    running = RunningHold(hold)
    token = _running.set(running)
    try:
        yield running
    finally:
        try:
            _close_streams(running)
        finally:
            _running.reset(token)


def _close_streams(running: RunningHold) -> None:
    """Charge what the body left running. One that can't be charged now must not keep the others from it."""
    for stream in tuple(running.streams):
        with suppress(*PASSING):  # logged where it happened; its intent stays on record
            stream.close()


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

    def extend(self, tokens: int) -> bool:
        """Add `tokens` to the running task's hold, if the user's budget allows. Denied, the task goes on as it was.

        Raises `NoHoldError` outside a metered task, `HoldOvertakenError` when another attempt has the hold.
        """
        running = _running_hold()
        reason, running.tokens_left = once(lambda connection: extend_hold(connection, running.hold, tokens))
        return reason is None

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `NoHoldError` outside a metered task, `HoldExhaustedError` when the hold does not cover the prompt and
        one token of answer, `HoldOvertakenError` when a later attempt has the hold, `ProviderError` when the provider
        fails, `ServiceUnavailableError` when the call could not be begun or its usage not be written.
        """
        call = self._begin(messages, max_completion_tokens)
        if call.paid is not None:
            return call.paid
        with _noted_failure(call):
            completion = self._provider.complete(messages, max_completion_tokens=call.limit)
        self._charge(call, completion)
        return completion

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Return one completion in chunks, charged when it ends: also when it breaks, or is closed early.

        `max_completion_tokens` and errors as with `complete`; iterating raises `ProviderError` when the stream breaks,
        after what had arrived was charged.
        """
        call = self._begin(messages, max_completion_tokens)
        if call.paid is not None:
            paid = call.paid
            return CompletionStream([paid.text], lambda: paid)
        with _noted_failure(call):
            source = self._provider.stream(messages, max_completion_tokens=call.limit)

        def finish() -> Completion:
            completion = source.completion()
            # What broke or was closed early is no answer to give to a redelivery as if it were whole.
            self._charge(call, completion, keep_answer=source.exhausted)
            call.running.streams.discard(stream)
            return completion

        stream = CompletionStream(source, finish)
        call.running.streams.add(stream)
        return stream

    def _begin(self, messages: Sequence[Message], max_completion_tokens: int | None) -> _Call:
        """Find the call's paid answer, or get leave to make it; from then on it is on record as started."""
        running = _running_hold()
        if running.is_lost:
            raise HoldOvertakenError(running.hold.task_id, running.hold.attempt)
        # Calls are told apart by their order in the task, so that a redelivery finds the same ones.
        key = f"{next(running.hold.ordinals)}:{_fingerprint(self._settings.model_name, messages)}"
        if running.hold.attempt > 1:
            found = retrying(lambda connection: find_answer(connection, running.hold, key))
            if found is not None:
                return _Call(running=running, key=key, limit=0, paid=Completion(**found))
        prompt_tokens = self._provider.count_prompt_tokens(messages)
        limit = cap_output(running, prompt_tokens, max_completion_tokens, call_key=key, settings=self._settings)
        return _Call(running=running, key=key, limit=limit)

    def _charge(self, call: _Call, completion: Completion, *, keep_answer: bool = True) -> None:
        """Write the usage: it stands for money spent, so it is tried again while the database can't take it."""
        hold = call.running.hold
        metadata = {
            "task_id": hold.task_id,
            "feature": hold.feature_name,
            "call": call.key,
            "usage_reported": completion.usage_reported,
        }
        answer = self._storable(completion) if keep_answer else None
        charge = retry_until_recorded(
            lambda connection: record_charge(
                connection, hold, call_key=call.key, usage=_usage(completion), metadata=metadata, answer=answer
            ),
            f"user {hold.user_id}, task {hold.task_id}, call {call.key}, {completion.total_tokens} tokens",
        )
        call.running.tokens_left = charge.tokens_left
        call.running.is_lost = charge.late
        _warn_if_uncovered(hold, call.key, charge)

    def _storable(self, completion: Completion) -> dict[str, Any] | None:
        """Return the answer to keep for a redelivery, or None if the settings or its size forbid."""
        if not self._settings.store_answers:
            return None
        answer = asdict(completion)
        size = len(json.dumps(answer).encode())
        return answer if size <= self._settings.stored_answer_max_bytes else None


def _running_hold() -> RunningHold:
    running = _running.get()
    if running is None:
        raise NoHoldError(
            "A model was called outside a metered task: no tokens are held for it, so nothing was spent. "
            "Call the task itself (delay, apply_async, or directly), not its run method."
        )
    return running


@contextmanager
def _noted_failure(call: _Call) -> Iterator[None]:
    """Note how a call ended that gave no usage. Any other end, such as a kill, leaves its intent as it was: started."""
    try:
        yield
    except ProviderError as error:
        unknown = error.outcome_unknown
        with suppress(*PASSING):  # then its intent stays, which says no less
            retrying(lambda connection: end_call(connection, call.running.hold, call_key=call.key, unknown=unknown))
        raise


def _fingerprint(model_name: str, messages: Sequence[Message]) -> str:
    """Identify a request: a changed one at the same place in the task is a new call.

    The limit on its answer is left out: it follows from what the hold has left, which a redelivery finds changed.
    """
    request = [model_name, *([message.role, message.content] for message in messages)]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]


def _usage(completion: Completion) -> Usage:
    return Usage(
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        total_tokens=completion.total_tokens,
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
