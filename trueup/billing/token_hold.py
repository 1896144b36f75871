"""Holds for work that runs inside a request and not as a task: `with ai_tokens(user, 1500, "Summaries") as hold`."""

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
from trueup.gate.holds import Hold, close_abandoned_hold, close_hold, open_hold
from trueup.gate.provider_calls import extend_hold
from trueup.host.sections import check_section
from trueup.settings.settings import get_settings
from trueup.usage.charges import Charge, Usage, record_charge
from trueup.usage.validation import check_count, check_counts, check_key, check_metadata, check_name

logger = logging.getLogger(__name__)

# Before a request's own key: a task's id never begins so, and its hold is never taken for a request's.
KEY_PREFIX = "request:"

# How long the end of a block waits for charges in threads. They retry for about 20 s themselves.
RECORDING_SECONDS = 30


class ai_tokens:  # noqa: N801 - used as a function: `with ai_tokens(…) as hold`
    """Holds tokens for its block, by the same gate as a task's: no number of requests can overspend together.

    `estimated_tokens`: count to set aside; what is not charged is given back when the block ends, however it ends.
    `key`: names the request, so that a copy of it that comes meanwhile is not let in; None means that there are none.
    A key may be used again once its block has ended: that passes the gate like any other request.
    Entering raises `TokensDenied`, whose `payload` is the body of a 402, `HoldBusyError` while another block of this
    key is at work, `ServiceUnavailableError`. Wrong arguments raise `InvalidInputError` before. `async with` works too.
    A process that dies in the block leaves its hold to run out, after `hold_ttl_seconds`.
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
        self._recording: set[Future[None]] = set()

    @property
    def hold(self) -> Hold:
        """The hold itself, for `trueup.llm.metering.spending_from`: in that block trueup's client spends from it."""
        if self._hold is None:
            raise NoHoldError("ai_tokens: no tokens are held outside of the block. Use `with ai_tokens(…) as hold`.")
        return self._hold

    @property
    def tokens_left(self) -> int:
        """Count that this block may still spend, after what it has charged itself."""
        return self._tokens_left

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
        _hold: Hold | None = None,
    ) -> Charge:
        """Record what a provider call cost, once: log row, hold, balance and legacy counter, in one transaction.

        `key`: names the call within this block, so that saying it again changes nothing; None means that each time is
        another call. `total_tokens`: None means the sum of both. More than was held is recorded all the same.
        While the database is away it is tried again for about 20 s. Raises `InvalidInputError`, `NoHoldError` outside
        of the block, `UnknownUserError`, `ServiceUnavailableError`.
        """
        hold = _hold or self.hold
        prompt, completion, total = check_counts(prompt_tokens, completion_tokens, total_tokens)
        if not isinstance(model_name, str):
            raise InvalidInputError(f"model_name: {model_name!r:.80} is no text")
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
            lambda connection: record_charge(connection, hold, call_key=call_key, usage=usage, metadata=more | named),
            f"user {hold.user_id}, {hold.task_id}, call {call_key}, {total} tokens",
        )
        # Of charges at once the last to be told may be the first that was written.
        self._tokens_left = min(self._tokens_left, charge.tokens_left)
        return charge

    async def acharge(self, **figures: Any) -> Charge:
        """Do as `charge`, without blocking the event loop."""
        hold = self.hold  # a caller that is cancelled may have left the block before a thread is free
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
        """Add `tokens` to the hold if the user's budget allows; False if not, and nothing has changed.

        Raises `NoHoldError` outside of the block, `HoldOvertakenError` when its time has run out, `InvalidInputError`.
        """
        hold = self.hold
        reason, self._tokens_left = once(lambda connection: extend_hold(connection, hold, tokens))
        return reason is None

    async def aextend(self, tokens: int) -> bool:
        """Do as `extend`, without blocking the event loop."""
        return await in_thread(lambda: self.extend(tokens))

    def __enter__(self) -> Self:
        if self._hold is not None:
            raise InvalidInputError("ai_tokens: this one is in use. Make another for each block.")
        if self._user_id is None:
            raise TokensDenied(denial_payload(denied_unknown_user()))
        self._hold = self._open(self._user_id)
        self._tokens_left = self._hold.tokens_left
        return self

    def _open(self, user_id: UserId) -> Hold:
        settings = get_settings()
        # A name that no other block has, not even another one of this key in this process.
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
            # The first try's answer may have been lost with its connection: then the hold at work is this block's own.
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
        """Give back what is left. If that fails, the hold's time runs out: the block's own work is done.

        The charges of cancelled callers are waited for: what they record must not be given back.
        """
        hold = self.hold
        wait(tuple(self._recording), RECORDING_SECONDS)
        self._hold, self._tokens_left = None, 0
        try:
            retrying(lambda connection: close_hold(connection, hold))
        except TrueupError:
            logger.warning(
                "hold of %s (user %s) not closed: it expires at %s", hold.task_id, hold.user_id, hold.expires_at
            )


def _call_key(key: str) -> str:
    """Return the key without "~", behind which a charge notes the attempt that bought a call a second time."""
    return f"key:{key.replace('%', '%25').replace('~', '%7E')}"
