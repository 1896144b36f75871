"""Holds for work inside a request instead of a task: `with ai_tokens(user, 1500, "Summaries") as hold`."""

import itertools
import logging
import os
import socket
import uuid
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection

from trueup.accounts.user_ids import UserId, user_id_of
from trueup.accounts.validation import check_estimate
from trueup.database.retry import once, retry_until_recorded, retrying
from trueup.database.threads import in_thread
from trueup.errors import HoldBusyError, InvalidInputError, NoHoldError, TokensDenied, TrueupError
from trueup.gate.decision import denied_unknown_user
from trueup.gate.denial import denial_payload
from trueup.gate.heartbeat import keep, stop_keeping
from trueup.gate.holds import Hold, close_abandoned_hold, close_hold, open_hold
from trueup.gate.provider_calls import extend_hold
from trueup.host.fields import check_section
from trueup.llm.bounds import bounding_counter
from trueup.llm.model import Message
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import count_prompt_tokens
from trueup.llm.weights import weighted
from trueup.settings.settings import get_settings
from trueup.usage.charge_events import deliver_soon
from trueup.usage.charges import Charge, Usage, record_charge
from trueup.usage.validation import check_count, check_counts, check_key, check_metadata, check_name

logger = logging.getLogger(__name__)

# The prefix of a request's key. No task id begins with it, so holds of tasks and requests never collide.
KEY_PREFIX = "request:"

# How long the end of a block waits for charges in threads. They retry for about 20 s themselves.
RECORDING_SECONDS = 30


class ai_tokens:  # noqa: N801 - used as a function: `with ai_tokens(…) as hold`
    """Holds tokens for its block by the same gate as a task, so that concurrent requests can't overspend.

    `estimated_tokens`: count to reserve. The end of the block releases the tokens that were not charged.
    `key`: names the request, so that a concurrent copy of it is refused; None means that there are no copies. After the
    block a key may be used again; the gate then treats it as a new request.
    Entering the block, also with `async with`, raises `TokensDenied`, whose `payload` is the body of a 402;
    `HoldBusyError` while another block with this key runs; or `ServiceUnavailableError`. Wrong arguments raise
    `InvalidInputError` at once. The heartbeat keeps the hold of a long block, for at most `hold_max_seconds`. If the
    process dies in the block, the hold expires after `hold_ttl_seconds`.
    """

    def __init__(
        self,
        user: Any,
        estimated_tokens: int,
        feature_name: str = "AI Feature",
        section: str = "other",
        key: str | None = None,
    ) -> None:
        self._user_id = user_id_of(user)
        self._estimated_tokens = check_estimate(estimated_tokens)
        self._feature_name = check_name(feature_name, "feature_name")
        self._section = check_section(section)
        self._task_id = KEY_PREFIX + (str(uuid.uuid4()) if key is None else check_key(key))
        self._calls = itertools.count(1)
        self._hold: Hold | None = None
        self._tokens_left = 0
        self._is_closed = False
        self._recording: set[Future[None]] = set()

    @property
    def hold(self) -> Hold:
        """The hold, for `trueup.llm.running.spending_from`: in its block trueup's client spends from the hold."""
        if self._hold is None:
            raise NoHoldError("ai_tokens: outside of the block no tokens are held. Use `with ai_tokens(…) as hold`.")
        return self._hold

    @property
    def tokens_left(self) -> int:
        """The count of tokens that this block may still spend."""
        return self._tokens_left

    def output_tokens(
        self, prompt: str | list[str] | tuple[str, ...], *, model_name: str | None = None, thinking_tokens: int = 0
    ) -> int:
        """Return how many tokens the answer to a prompt may have, so that the call stays within the hold; 0: none.

        Give it to the provider as the cap of the answer. `prompt`: the text of the prompt, or of each of its messages;
        it is counted with the model's tokenizer, or bounded if that is not known. `model_name` None: the settings'.
        `thinking_tokens`: a count to leave for thinking that the provider bills beside its cap.
        Raises `InvalidInputError`, and `NoHoldError` outside of the block.
        """
        settings = get_settings()
        self.hold  # noqa: B018 - raises outside of the block
        name = settings.model_name if model_name is None else check_name(model_name, "model_name")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list | tuple) or not all(isinstance(part, str) for part in texts):
            raise InvalidInputError("prompt: it is no text. Give a string, or a list of strings.")
        messages = [Message(role="user", content=part) for part in texts]
        demand = Demand(
            prompt_tokens=count_prompt_tokens(messages, bounding_counter(name, settings)),
            beside=check_count(thinking_tokens, "thinking_tokens"),
        )
        return max(0, weighted(demand, name, settings).limit(self._tokens_left))

    def charge(
        self,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        model_name: str,
        total_tokens: int | None = None,
        response_time_ms: int = 0,
        key: str | None = None,
        metadata: dict[str, Any] | None = None,
        last: bool = False,
        _hold: Hold | None = None,
    ) -> Charge:
        """Record the usage of a provider call once: log row, hold, balance and legacy counter, in one transaction.

        `key`: the idempotency key of the call within this block; None means that each charge is another call.
        `total_tokens`: None means the sum of both counts. `response_time_ms`: milliseconds. `last`: the block makes no
        further call, so the same transaction also releases its remaining tokens. Usage beyond the hold is recorded too.
        If the database does not answer, the charge is retried for about 20 s. Raises `InvalidInputError`,
        `NoHoldError` outside of the block, `UnknownUserError`, `ServiceUnavailableError`.
        """
        hold = _hold or self.hold
        prompt, completion, total = check_counts(prompt_tokens, completion_tokens, total_tokens)
        if not isinstance(model_name, str):
            raise InvalidInputError(f"model_name: {model_name!r:.80} is no text. Give the model's name.")
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=total,
            response_time_ms=check_count(response_time_ms, "response_time_ms"),
            model_name=model_name,
        )
        more = check_metadata(metadata)
        call_key = str(next(self._calls)) if key is None else _call_key(check_key(key))
        named = {"task_id": hold.task_id, "feature": hold.feature_name, "call": call_key}
        charge = retry_until_recorded(
            lambda connection: record_charge(
                connection, hold, call_key=call_key, usage=usage, metadata=more | named, last=last
            ),
            f"user={hold.user_id} task={hold.task_id} call={call_key} tokens={total}",
        )
        deliver_soon()
        # Of concurrent charges, the first to be written may be the last to return.
        self._tokens_left = min(self._tokens_left, charge.tokens_left)
        self._is_closed = self._is_closed or charge.closed
        return charge

    async def acharge(self, **figures: Any) -> Charge:
        """Charge as `charge` does, without blocking the event loop."""
        hold = self.hold  # read now: a cancelled caller may leave the block before a thread is free
        recorded: Future[None] = Future()
        self._recording.add(recorded)

        def record() -> Charge:
            try:
                return self.charge(**figures, _hold=hold)
            finally:
                self._recording.discard(recorded)
                recorded.set_result(None)

        return await in_thread(record)

    def extend(self, tokens: int) -> bool:
        """Add `tokens` (a count) to the hold. Returns False, and changes nothing, if the budget does not allow it.

        Raises `NoHoldError` outside of the block, `HoldOvertakenError` if the hold has expired, `InvalidInputError`.
        """
        hold = self.hold
        reason, self._tokens_left = once(lambda connection: extend_hold(connection, hold, tokens))
        return reason is None

    async def aextend(self, tokens: int) -> bool:
        """Extend as `extend` does, without blocking the event loop."""
        return await in_thread(lambda: self.extend(tokens))

    def __enter__(self) -> Self:
        if self._hold is not None:
            raise InvalidInputError("ai_tokens: this hold is in use. Create one for each block.")
        if self._user_id is None:
            raise TokensDenied(denial_payload(denied_unknown_user()))
        self._hold = self._open(self._user_id)
        self._tokens_left, self._is_closed = self._hold.tokens_left, False
        keep(self._hold)
        return self

    def _open(self, user_id: UserId) -> Hold:
        settings = get_settings()
        # Unique for each block, even for blocks with the same key in this process.
        owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"

        def open_own(connection: Connection) -> Hold:
            return open_hold(
                connection,
                user_id=user_id,
                task_id=self._task_id,
                feature_name=self._feature_name,
                section=self._section,
                estimated_tokens=self._estimated_tokens,
                owner=owner,
                lease_seconds=settings.hold_ttl_seconds,
                ttl_seconds=settings.hold_ttl_seconds,
            )

        try:
            return retrying(open_own)
        except HoldBusyError:
            # If the answer of the first attempt was lost with its connection, the open hold is this block's own.
            closed = retrying(lambda connection: close_abandoned_hold(connection, user_id, self._task_id, owner=owner))
            if closed is None:
                raise
        return retrying(open_own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    async def __aenter__(self) -> Self:
        return await in_thread(self.__enter__, undo=self._close)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await in_thread(self._close)

    def _close(self) -> None:
        """Release the remaining tokens, after the charges of cancelled callers: these must not be released.

        If that fails, only log it: the work is done, and the hold will expire.
        """
        hold = self.hold
        try:
            wait(tuple(self._recording), RECORDING_SECONDS)
        finally:
            stop_keeping(hold)
        self._hold, self._tokens_left = None, 0
        if self._is_closed:
            return
        try:
            retrying(lambda connection: close_hold(connection, hold))
        except TrueupError:
            logger.warning(
                "hold not closed, it will expire task=%s user=%s expires_at=%s",
                hold.task_id,
                hold.user_id,
                hold.expires_at,
            )


def _call_key(key: str) -> str:
    """Return the key without "~", which separates a call's key from the attempt that bought the call twice."""
    return f"key:{key.replace('%', '%25').replace('~', '%7E')}"
