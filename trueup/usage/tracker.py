"""The usage tracker, for host code that calls a provider itself: one row in the log, exactly once by key."""

import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from psycopg.errors import ForeignKeyViolation
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from trueup.accounts.user_ids import UserId, user_id_of
from trueup.database.driver_errors import reason_of
from trueup.database.retry import retry_until_recorded
from trueup.database.threads import in_thread
from trueup.errors import InvalidInputError, TrueupError, UnknownUserError
from trueup.host.sections import check_section
from trueup.usage.charges import LOG_NAMESPACE
from trueup.usage.validation import check_count, check_counts, check_key, check_metadata, storable_text

logger = logging.getLogger(__name__)

# What stands in a charge for a task: no task has an id with a space in it.
TASK_ID = "reported usage"
# A host's clock may be this far ahead of the database's.
CLOCK_SKEW_SECONDS = 300

_MAX_MODEL_NAME = 100
_MAX_ERROR = 2000


@dataclass(frozen=True, kw_only=True)
class TrackedUsage:
    """What became of a report. `recorded` False: its key was there already, and the first report stands.

    `differs`: that one has other figures than this. `log_id`: the row in the log.
    """

    recorded: bool
    differs: bool
    log_id: str


def track_ai_usage(
    user: Any,
    *,
    section: str,
    prompt_tokens: int,
    completion_tokens: int,
    model_name: str,
    key: str,
    total_tokens: int | None = None,
    response_time_ms: int = 0,
    success: bool = True,
    error_message: str | None = None,
    metadata: dict[str, Any] | None = None,
    created_at: datetime | None = None,
) -> TrackedUsage:
    """Record what one provider call cost: log row, balance and legacy counter, in one transaction.

    `key` names the call, best by the provider's own id of it: reported again, it is recorded once. A call that failed
    (`success` False) counts for nothing, and leaves its key free for one that succeeds. No hold is needed, and usage
    beyond the budget is recorded all the same. `total_tokens`: None means the sum of both. `created_at`: None means
    now, by the database's clock.
    While the database is away it is tried again for about 20 s. Raises `InvalidInputError` (then nothing was written),
    `UnknownUserError`, `ServiceUnavailableError`.
    """
    fixed = _Fixed.of(user, section=section, key=key, metadata=metadata, created_at=created_at)
    figures = _Figures.of(prompt_tokens, completion_tokens, total_tokens, model_name, response_time_ms)
    if not isinstance(success, bool):
        raise InvalidInputError(f"success: {success!r} is neither True nor False")
    if error_message is not None and not isinstance(error_message, str):
        raise InvalidInputError(f"error_message: {error_message!r:.80} is no text")
    return _record(fixed, figures, success=success, error=error_message)


class ai_usage:  # noqa: N801 - used as a function: `with ai_usage(user, section=…, key=…) as usage`
    """Records what the provider call in its block cost, and how long it took; `async with` works too.

    Say the figures with `usage.set(…)` as soon as the provider has named them: from then on they count, also when the
    rest of the block fails. A block that fails before is recorded as a failed call, and its error goes on. A block that
    ends without figures is an error, for what it spent is not known; say zeros where nothing was bought.
    `recorded` has what became of it, after the block.
    Raises as `track_ai_usage`; what is wrong with the arguments before the block begins.
    """

    recorded: TrackedUsage | None = None

    def __init__(
        self, user: Any, *, section: str, key: str, model_name: str = "", metadata: dict[str, Any] | None = None
    ) -> None:
        self._fixed = _Fixed.of(user, section=section, key=key, metadata=metadata, created_at=None)
        self._model_name = _check_model_name(model_name)
        self._figures: _Figures | None = None
        self._started = time.monotonic()
        self._is_over = False

    def set(
        self,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        total_tokens: int | None = None,
        model_name: str | None = None,
        response_time_ms: int | None = None,
    ) -> None:
        """Say what the call cost; said again, the last holds. `model_name`: None means the one given at first.

        `response_time_ms`: None means measured, from the beginning of the block to here. Raises `InvalidInputError`,
        also after the block: what it spent is recorded by then.
        """
        if self._is_over:
            raise InvalidInputError(
                f"usage: the block of key {self._fixed.key!r} has ended, so these figures are not recorded. Call "
                "usage.set(…) within it, or report them with track_ai_usage and a key of their own."
            )
        measured = self._elapsed_ms() if response_time_ms is None else response_time_ms
        name = self._model_name if model_name is None else model_name
        self._figures = _Figures.of(prompt_tokens, completion_tokens, total_tokens, name, measured)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._is_over = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await in_thread(lambda: self._end(error))

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - self._started) * 1000)

    def _end(self, error: BaseException | None) -> None:
        self._is_over = True
        said = None if error is None else f"{type(error).__name__}: {error}"
        if self._figures is not None:
            self.recorded = _record(self._fixed, self._figures, success=True, error=said)
        elif error is None:
            raise InvalidInputError(
                f"usage: the block of key {self._fixed.key!r} ended without usage.set(…), so nothing was recorded. "
                "Call it with what the provider billed, or with zeros where nothing was bought."
            )
        else:
            self._note_failure(error, said)

    def _note_failure(self, error: BaseException, said: str | None) -> None:
        """Record the failed call. Nothing is lost if that fails too: the block's own error is the one to go on."""
        figures = _Figures.of(0, 0, None, self._model_name, self._elapsed_ms())
        try:
            self.recorded = _record(self._fixed, figures, success=False, error=said)
        except (TrueupError, DBAPIError) as not_recorded:
            error.add_note(f"This failed call is not in the usage log: {reason_of(not_recorded)}")


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """What is known of a call before it is made, checked."""

    user_id: UserId
    section: str
    key: str
    metadata: dict[str, Any]
    created_at: datetime | None

    @classmethod
    def of(cls, user: Any, *, section: object, key: object, metadata: object, created_at: datetime | None) -> "_Fixed":
        user_id = user_id_of(user)
        if user_id is None:
            raise InvalidInputError("user: this one has no id, so there is nobody to record the usage for")
        if created_at is not None and (not isinstance(created_at, datetime) or created_at.tzinfo is None):
            raise InvalidInputError(f"created_at: {created_at!r} is no time with a time zone")
        return cls(
            user_id=user_id,
            section=check_section(section),
            key=check_key(key),
            metadata=check_metadata(metadata),
            created_at=created_at,
        )


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """What a call cost, checked."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    model_name: str
    response_time_ms: int

    @classmethod
    def of(cls, prompt: object, completion: object, total: object, model_name: object, elapsed: object) -> "_Figures":
        prompt_tokens, completion_tokens, total_tokens = check_counts(prompt, completion, total)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=total_tokens,
            model_name=_check_model_name(model_name),
            response_time_ms=check_count(elapsed, "response_time_ms"),
        )


def _check_model_name(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidInputError(f"model_name: {name!r:.80} is no text")
    return storable_text(name)[:_MAX_MODEL_NAME]


_RECORD = text(
    """
    SELECT recorded, differs, in_future, log_id
    FROM trueup.record_usage(:user_id, :task_id, :call_key, :log_id, :section, :prompt_tokens, :completion_tokens,
                             :total_tokens, :response_time_ms, :success, :model_name, :error, CAST(:metadata AS jsonb),
                             CAST(:created_at AS timestamptz), make_interval(secs => :skew_seconds), NULL)
    """
)


def _record(fixed: _Fixed, figures: _Figures, *, success: bool, error: str | None) -> TrackedUsage:
    # A failed call does not take the key away from the one that is made in its place.
    call_key = f"{'call' if success else 'failed'}:{fixed.key}"
    values = {
        "user_id": fixed.user_id,
        "task_id": TASK_ID,
        "call_key": call_key,
        "log_id": str(uuid.uuid5(LOG_NAMESPACE, json.dumps([str(fixed.user_id), TASK_ID, call_key]))),
        "section": fixed.section,
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "total_tokens": figures.total_tokens,
        "response_time_ms": figures.response_time_ms,
        "success": success,
        "model_name": figures.model_name,
        "error": None if error is None else storable_text(error)[:_MAX_ERROR],
        "metadata": json.dumps({**fixed.metadata, "usage_key": fixed.key}),
        "created_at": fixed.created_at,
        "skew_seconds": CLOCK_SKEW_SECONDS,
    }
    what = f"user {fixed.user_id}, key {fixed.key!r}, {figures.total_tokens} tokens"
    row = retry_until_recorded(_writing(values, what), what)
    if row.in_future:
        raise InvalidInputError(
            f"created_at: {fixed.created_at} is later than the database's clock. Give when the call was made, or "
            "nothing for now."
        )
    if row.differs:
        logger.warning("usage was reported before with other figures, which stand: %s", what)
    return TrackedUsage(recorded=row.recorded, differs=row.differs, log_id=row.log_id)


def _writing(values: dict[str, Any], what: str) -> Callable[[Connection], Any]:
    def write(connection: Connection) -> Any:
        try:
            return connection.execute(_RECORD, values).one()
        except IntegrityError as error:
            if not isinstance(error.orig, ForeignKeyViolation):
                raise
            raise UnknownUserError(f"user: no user of the host's has this id. Not logged: {what}.") from error

    return write
