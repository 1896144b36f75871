"""One provider call of a running hold: begun under a bound, replayed if it was paid for, and charged once."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from trueup.database.retry import PASSING, retry_until_recorded, retrying
from trueup.errors import HoldOvertakenError
from trueup.gate.holds import Hold
from trueup.gate.provider_calls import end_call
from trueup.llm.formats.usage import TokenUsage
from trueup.llm.output_cap import Demand, cap_output
from trueup.llm.running import RunningHold
from trueup.llm.traced_calls import Operation, TracedCall
from trueup.llm.weights import counted_tokens
from trueup.settings.settings import Settings
from trueup.usage.charge_events import deliver_soon
from trueup.usage.charges import Charge, Usage, charged_numbers, find_answer, record_charge

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """An admitted call. `limit`: tokens of the answer, at most. `paid`: an earlier attempt's answer to replay.

    `number`: the call's number among the calls of its fingerprint.
    """

    running: RunningHold
    fingerprint: str
    number: int
    key: str
    limit: int
    traced: TracedCall
    paid: dict[str, Any] | None = None


def fingerprint_of(request: Any) -> str:
    """Return the fingerprint of a call's request, a JSON value. Calls with the same one are told apart by their number.

    Leave out the limit on the answer, which depends on the hold's remaining tokens and so differs in a redelivery.
    """
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def begin(
    running: RunningHold, fingerprint: str, demand: Callable[[], Demand], settings: Settings, operation: Operation
) -> Call:
    """Return the call with its paid answer, or admit it under a bound and record its intent.

    `demand`: what the call may cost; asked for only if the call is not paid. `operation`: for traces. Raises
    `HoldExhaustedError` if the hold does not cover it, `HoldOvertakenError` if a later attempt has the hold, and what
    `demand` raises.
    """
    hold = running.hold
    if running.is_lost:
        raise HoldOvertakenError(hold.task_id, hold.attempt)
    number, paid = _number(hold, fingerprint)
    key = _key(hold, fingerprint, number)
    traced = TracedCall(operation, hold.task_id, hold.feature_name)
    try:
        with traced.current():
            limit = 0 if paid is not None else cap_output(running, demand(), call_key=key, settings=settings)
    except BaseException as error:  # not sent, so not billed
        hold.calls.give_back(fingerprint, number)
        traced.gave_up(type(error).__name__)
        raise
    if paid is not None:
        traced.replayed()
    return Call(running=running, fingerprint=fingerprint, number=number, key=key, limit=limit, traced=traced, paid=paid)


def _number(hold: Hold, fingerprint: str) -> tuple[int, dict[str, Any] | None]:
    """Return the number of the next call with this fingerprint, and its answer if it is paid for and stored.

    A number that an earlier attempt used for a call with an unknown outcome is skipped if a later one is charged: that
    attempt asked again, and got the later call's answer.
    """
    number = hold.calls.take(fingerprint)
    if hold.attempt == 1:
        return number, None
    try:
        answer = _answer(hold, fingerprint, number)
        if answer is None:
            prefix = _key(hold, fingerprint, None)
            charged = retrying(lambda connection: charged_numbers(connection, hold, prefix))
            while number not in charged and any(other > number for other in charged):
                number = hold.calls.take(fingerprint)
            answer = _answer(hold, fingerprint, number)
    except BaseException:
        hold.calls.give_back(fingerprint, number)
        raise
    return number, answer


def _answer(hold: Hold, fingerprint: str, number: int) -> dict[str, Any] | None:
    key = _key(hold, fingerprint, number)
    return retrying(lambda connection: find_answer(connection, hold, key))


def _key(hold: Hold, fingerprint: str, number: int | None) -> str:
    return f"{hold.scope}:{fingerprint}:{'' if number is None else number}"


def end_without_usage(call: Call, *, unknown: bool, error_type: str = "_OTHER") -> None:
    """Record that a call failed. `unknown`: it may have been billed, so its intent stays as evidence.

    `error_type`: the error's name, for traces.
    """
    call.traced.failed(error_type)
    with suppress(*PASSING):  # the intent then stays started, which reports the call as unrecorded
        retrying(lambda connection: end_call(connection, call.running.hold, call_key=call.key, unknown=unknown))
    if not unknown:
        call.running.hold.calls.give_back(call.fingerprint, call.number)


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a call has cost.

    `is_reported`: by the provider; otherwise it is an estimate. `model_asked`: the model that the call named; its
    weight counts, because the bound was made by that name too. `model_name`: the model that answered.
    """

    tokens: TokenUsage
    is_reported: bool
    model_asked: str
    model_name: str
    response_time_ms: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Bill":
        """Return the bill that `as_json` has written."""
        return cls(**value | {"tokens": TokenUsage(**value["tokens"])})

    def as_json(self) -> dict[str, Any]:
        """Return the bill as it is stored with an answer for a replay."""
        return asdict(self)

    def usage(self, settings: Settings) -> Usage:
        """Return what the charge records, with the total that counts against the budget."""
        return Usage(
            prompt_tokens=self.tokens.prompt,
            completion_tokens=self.tokens.completion,
            total_tokens=counted_tokens(self.tokens, self.model_asked, settings),
            response_time_ms=self.response_time_ms,
            model_name=self.model_name,
            classes=self.tokens.classes(),
        )

    def metadata(self) -> dict[str, Any]:
        """Return what the log row keeps beside its columns."""
        found = {name: tokens for name, tokens in self.tokens.classes().items() if tokens}
        estimated = {} if self.is_reported else {"estimated": True}
        return {"usage_reported": self.is_reported, "tokens": found} | estimated


def charge(call: Call, bill: Bill, settings: Settings, *, answer: dict[str, Any] | None) -> None:
    """Record the usage. It was paid for, so the write is retried while the database is unavailable.

    `answer`: what a redelivery gets, if the settings and its size allow it; None: nothing.
    """
    hold = call.running.hold
    metadata = {"task_id": hold.task_id, "feature": hold.feature_name, "call": call.key} | bill.metadata()
    usage = bill.usage(settings)
    kept = None if answer is None else _storable(answer, settings)
    try:
        with call.traced.current():
            charged = retry_until_recorded(
                lambda connection: record_charge(
                    connection, hold, call_key=call.key, usage=usage, metadata=metadata, answer=kept
                ),
                f"user {hold.user_id}, task {hold.task_id}, call {call.key}, {usage.total_tokens} tokens",
            )
    except BaseException as error:
        call.traced.gave_up(type(error).__name__)
        raise
    call.traced.charged(usage, is_new=charged.recorded)
    deliver_soon()
    call.running.tokens_left = charged.tokens_left
    call.running.is_lost = call.running.is_lost or charged.late
    _warn_if_uncovered(hold, call.key, charged)


def _storable(answer: dict[str, Any], settings: Settings) -> dict[str, Any] | None:
    """Return the answer to store for a replay; None if the settings or its size do not allow it."""
    if not settings.store_answers:
        return None
    return answer if len(json.dumps(answer).encode()) <= settings.stored_answer_max_bytes else None


def _warn_if_uncovered(hold: Hold, call_key: str, charged: Charge) -> None:
    if charged.recorded and (charged.tokens_over or charged.late):
        logger.warning(
            "charge not covered by its hold task=%s user=%s call=%s tokens_over=%d late=%s",
            hold.task_id,
            hold.user_id,
            call_key,
            charged.tokens_over,
            charged.late,
        )
