"""The metered model client. It spends only from the running task's hold, and charges every call.

The metered base task sets the hold in a context variable while its body runs. Code that calls a task's body in any
other way finds no hold and can't spend.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from trueup.database.retry import PASSING, once, retry_until_recorded, retrying
from trueup.database.threads import in_thread
from trueup.errors import (
    HoldOvertakenError,
    NoHoldError,
    ProviderError,
)
from trueup.gate.holds import Hold
from trueup.gate.provider_calls import end_call, extend_hold
from trueup.llm.awaitable import AwaitableModel, InFlight
from trueup.llm.model import Completion, CompletionStream, Message, Provider
from trueup.llm.output_cap import cap_output
from trueup.settings.settings import Settings, get_settings
from trueup.usage.charges import Charge, Usage, find_answer, record_charge

logger = logging.getLogger(__name__)

_running: ContextVar["RunningHold | None"] = ContextVar("trueup_running_hold", default=None)


class RunningHold:
    """The hold of the running task and its remaining tokens. Each attempt of a task has its own.

    The body may call the model from several threads, if each of them runs in a copy of the body's context.
    `tokens_left` is what the database answered last. Another thread's call may have changed it since, so it only
    proposes a bound, and the database decides.
    """

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.tokens_left = hold.tokens_left
        self.in_flight = InFlight()
        self.is_lost = False  # set by a late charge, which means that this attempt no longer has the hold
        self._lock = threading.Lock()
        self._streams: set[CompletionStream] = set()  # open streams; each must be charged before the body ends
        self._calls = 0  # calls in progress, from the intent to the charge
        self._call_ended = threading.Condition(self._lock)
        self._is_over = False

    def add_stream(self, stream: CompletionStream) -> None:
        """Have the stream charged when the body ends; at once if it has ended."""
        with self._lock:
            is_over = self._is_over
            if not is_over:
                self._streams.add(stream)
        if is_over:
            stream.close()

    def remove_stream(self, stream: CompletionStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Have the hold's end wait for this block. Raises `NoHoldError` once the body has ended."""
        with self._lock:
            self.refuse_if_over()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._call_ended.notify_all()

    def wait_for_calls(self) -> None:
        """Return once no call is in progress, or after the time of a lease: no call takes longer."""
        with self._lock:
            self._call_ended.wait_for(lambda: not self._calls, get_settings().lease_seconds)

    def refuse_if_over(self) -> None:
        """Raise `NoHoldError` once the body has ended: a thread that it left behind must not spend any more."""
        if self._is_over:
            raise NoHoldError(
                f"A thread called a model after the body of task {self.hold.task_id} had ended, so no tokens are held "
                "for the call. Nothing was spent. Wait for the body's threads before it returns."
            )

    def end(self) -> tuple[CompletionStream, ...]:
        """Admit no further calls. Returns the streams that are open."""
        with self._lock:
            self._is_over = True
            return tuple(self._streams)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """An admitted call. `limit`: tokens of the answer, at most. `paid`: an earlier attempt's answer to replay.

    `number`: the call's number among the calls of its fingerprint.
    """

    running: RunningHold
    fingerprint: str
    number: int
    key: str
    limit: int
    paid: Completion | None = None


def running_hold() -> Hold | None:
    """Return the hold of the metered task that runs in this context; None outside of one."""
    running = _running.get()
    return running.hold if running else None


class spending_from:  # noqa: N801 - used as a function: `with spending_from(hold)`
    """Lets model calls in this context spend from `hold` until the block ends. It then charges open streams.

    `async with` does the same without blocking the event loop. For a generator that a web framework resumes use
    `stream_with_tokens`: each of its steps may run in another context.
    """

    def __init__(self, hold: Hold) -> None:
        self._running = RunningHold(hold)
        self._bound = bound(self._running)

    def __enter__(self) -> RunningHold:
        self._bound.__enter__()
        return self._running

    def __exit__(self, *error: Any) -> None:
        try:
            finish(self._running)
        finally:
            self._bound.__exit__(None, None, None)

    async def __aenter__(self) -> RunningHold:
        return self.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        self._bound.__exit__(None, None, None)
        await in_thread(lambda: finish(self._running))


@contextmanager
def bound(running: RunningHold) -> Iterator[None]:
    """Let model calls in this context spend from a hold until the block ends."""
    previous = _running.get()
    _running.set(running)
    try:
        yield
    finally:
        # A generator may be closed in another context than it began in. That context has another value, or none.
        if _running.get() is running:
            _running.set(previous)


def finish(running: RunningHold) -> None:
    """Wait for the calls that cancelled callers and the body's threads have left running; charge the open streams."""
    try:
        running.in_flight.wait()
    finally:  # a time limit's exception may end the wait
        _close_streams(running)
    running.wait_for_calls()


def _close_streams(running: RunningHold) -> None:
    """Charge the streams that the body left open. A stream that can't be charged now must not stop the others."""
    for stream in running.end():
        with suppress(*PASSING):  # already logged; the call intent stays recorded
            stream.close()


class MeteredModel(AwaitableModel):
    """A `Model` that asks a provider for at most the tokens that the hold covers, and charges the real usage.

    A redelivered task repeats its calls, in any order. Calls already paid for are replayed from their charges.
    `make_provider` is called on first use.
    """

    def __init__(self, make_provider: Callable[[], Provider], settings: Settings) -> None:
        self._make_provider = make_provider
        self._settings = settings

    @cached_property
    def provider(self) -> Provider:
        """The provider, made on first use, because a task that calls no model needs none.

        Raises `SettingsError` as `make_provider` does. A task reads this before it holds tokens, to fail early.
        """
        return self._make_provider()

    @property
    def tokens_left(self) -> int:
        """Tokens that the running task may still spend. Raises `NoHoldError` outside a metered task."""
        return _running_hold().tokens_left

    def in_flight(self) -> InFlight:
        """Return the calls in threads of the running hold. Raises `NoHoldError` outside a metered task."""
        return _running_hold().in_flight

    def extend(self, tokens: int) -> bool:
        """Add `tokens` to the running task's hold. Returns False if the budget denies it; the hold is then unchanged.

        Raises `NoHoldError` outside a metered task, `HoldOvertakenError` if another attempt has the hold.
        """
        running = _running_hold()
        reason, running.tokens_left = once(lambda connection: extend_hold(connection, running.hold, tokens))
        return reason is None

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `NoHoldError` outside a metered task, `HoldExhaustedError` if the hold does not cover the prompt and
        one token of the answer, `HoldOvertakenError` if a later attempt has the hold, `ProviderError` if the provider
        fails, `ServiceUnavailableError` if the database can't record the call intent or the usage.
        """
        running = _running_hold()
        with running.calling():
            call = self._begin(running, messages, max_completion_tokens)
            if call.paid is not None:
                return call.paid
            with _noted_failure(call):
                completion = self.provider.complete(messages, max_completion_tokens=call.limit)
            self._charge(call, completion)
            return completion

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Return one completion in chunks, charged when the stream ends, breaks or is closed early.

        `max_completion_tokens` and errors are as in `complete`. Iterating raises `ProviderError` if the stream breaks,
        after the received part was charged.
        """
        running = _running_hold()
        with running.calling():
            return self._stream(running, messages, max_completion_tokens)

    def _stream(
        self, running: RunningHold, messages: Sequence[Message], max_completion_tokens: int | None
    ) -> CompletionStream:
        call = self._begin(running, messages, max_completion_tokens)
        if call.paid is not None:
            paid = call.paid
            return CompletionStream([paid.text], lambda: paid)
        with _noted_failure(call):
            source = self.provider.stream(messages, max_completion_tokens=call.limit)

        def finish() -> Completion:
            completion = source.completion()
            # A stream that broke or was closed early is incomplete, so it must not be replayed as the whole answer.
            self._charge(call, completion, keep_answer=source.exhausted)
            call.running.remove_stream(stream)
            return completion

        stream = CompletionStream(source, finish)
        call.running.add_stream(stream)
        return stream

    def _begin(self, running: RunningHold, messages: Sequence[Message], max_completion_tokens: int | None) -> _Call:
        """Return the call's paid answer, or admit the call and record its intent."""
        hold = running.hold
        if running.is_lost:
            raise HoldOvertakenError(hold.task_id, hold.attempt)
        fingerprint = call_fingerprint(self._settings.model_name, messages)
        number = hold.calls.take(fingerprint)
        key = f"{hold.scope}:{fingerprint}:{number}"
        try:
            paid, limit = self._answer_or_limit(running, key, messages, max_completion_tokens)
        except BaseException:  # not sent, so not billed
            hold.calls.give_back(fingerprint, number)
            raise
        return _Call(running=running, fingerprint=fingerprint, number=number, key=key, limit=limit, paid=paid)

    def _answer_or_limit(
        self, running: RunningHold, key: str, messages: Sequence[Message], max_completion_tokens: int | None
    ) -> tuple[Completion | None, int]:
        """Return a call's paid answer, or None and the limit of the answer that it may buy."""
        hold = running.hold
        if hold.attempt > 1:
            found = retrying(lambda connection: find_answer(connection, hold, key))
            if found is not None:
                return Completion(**found), 0
        prompt_tokens = self.provider.count_prompt_tokens(messages)
        return None, cap_output(running, prompt_tokens, max_completion_tokens, call_key=key, settings=self._settings)

    def _charge(self, call: _Call, completion: Completion, *, keep_answer: bool = True) -> None:
        """Record the usage. It was paid for, so the write is retried while the database is unavailable."""
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
        call.running.is_lost = call.running.is_lost or charge.late
        _warn_if_uncovered(hold, call.key, charge)

    def _storable(self, completion: Completion) -> dict[str, Any] | None:
        """Return the answer to store for a replay; None if the settings or its size do not allow it."""
        if not self._settings.store_answers:
            return None
        answer = asdict(completion)
        size = len(json.dumps(answer).encode())
        return answer if size <= self._settings.stored_answer_max_bytes else None


def _running_hold() -> RunningHold:
    running = _running.get()
    if running is None:
        raise NoHoldError(
            "A model was called outside a metered task, so no tokens are held for the call. Nothing was spent. "
            "Call the task itself (delay, apply_async, or directly), not its run method. In the generator of a "
            "streaming view, use stream_with_tokens."
        )
    running.refuse_if_over()
    return running


@contextmanager
def _noted_failure(call: _Call) -> Iterator[None]:
    """Record the outcome of a call that failed without usage. After any other end, such as a kill, it stays started."""
    try:
        yield
    except ProviderError as error:
        unknown = error.outcome_unknown
        with suppress(*PASSING):  # the intent then stays started, which reports the call as unrecorded
            retrying(lambda connection: end_call(connection, call.running.hold, call_key=call.key, unknown=unknown))
        if not unknown:
            call.running.hold.calls.give_back(call.fingerprint, call.number)
        raise


def call_fingerprint(model_name: str, messages: Sequence[Message]) -> str:
    """Return the fingerprint of a call. Calls of a task with the same fingerprint are told apart by their number.

    It leaves out the limit on the answer, which depends on the hold's remaining tokens and so differs in a redelivery.
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
            "charge not covered by its hold task=%s user=%s call=%s tokens_over=%d late=%s",
            hold.task_id,
            hold.user_id,
            call_key,
            charge.tokens_over,
            charge.late,
        )
