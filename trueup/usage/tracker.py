"""The usage tracker records provider calls that host code makes itself: one log row for each idempotency key."""

import json
import logging
import time
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
from trueup.host.fields import check_section
from trueup.host.sections import require_section
from trueup.settings.settings import get_settings
from trueup.usage.charge_events import deliver_soon, with_event
from trueup.usage.charges import log_id_of, log_owed
from trueup.usage.validation import (
    MAX_MODEL_NAME,
    check_count,
    check_counts,
    check_key,
    check_metadata,
    storable_text,
    too_large,
)

logger = logging.getLogger(__name__)

# The task id in a charge of reported usage. No real task id contains a space.
TASK_ID = "reported usage"
# A host's clock may be this far ahead of the database's.
CLOCK_SKEW_SECONDS = 300

_MAX_ERROR = 2000


@dataclass(frozen=True, kw_only=True)
class TrackedUsage:
    """The result of a report.

    `recorded` False: the key was recorded before, and the first report stays. `differs`: the first report has other
    figures than this one. `log_id`: the row's id in the usage log. `owed`: the log refused the row. The tokens
    count, and trueup tries again to write the row, perhaps under another id.
    """

    recorded: bool
    differs: bool
    log_id: str
    owed: bool = False


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
    """Record the usage of one provider call: log row, balance and legacy counter, in one transaction.

    `key`: idempotency key of the call, preferably the provider's own id. A repeated report of a key is not recorded
    again. `success` False: the call failed; it counts 0 tokens, and a later successful call may use the same key.
    `total_tokens` None: the sum of prompt and completion tokens. `response_time_ms`: milliseconds. `created_at` None:
    now, by the database's clock. No hold is needed, and usage beyond the budget is recorded too.
    If the host refuses the log row, the usage counts all the same and the row is tried again: see `TrackedUsage.owed`.
    While the database is unavailable, the write is retried for about 20 s. Raises `InvalidInputError` (then nothing
    was written), `UnknownUserError`, `ServiceUnavailableError`.
    """
    fixed = _Fixed.of(user, section=section, key=key, metadata=metadata, created_at=created_at)
    figures = _Figures.of(prompt_tokens, completion_tokens, total_tokens, model_name, response_time_ms)
    if not isinstance(success, bool):
        raise InvalidInputError(f"success: {success!r} is not a bool. Give True or False.")
    if error_message is not None and not isinstance(error_message, str):
        raise InvalidInputError(f"error_message: {error_message!r:.80} is not a string. Give a string or None.")
    return _record(fixed, figures, success=success, error=error_message)


class ai_usage:  # noqa: N801 - used as a function: `with ai_usage(user, section=…, key=…) as usage`
    """Record the usage and duration of the provider call in a block; `async with` works too.

    Call `usage.set(…)` as soon as the provider reports its figures: they are recorded even if the rest of the block
    fails. A block that fails before `set` is recorded as a failed call, and its error is raised. A block that ends
    without `set` raises `InvalidInputError`, because its cost is unknown; call `set` with zeros if nothing was bought.
    After the block, `recorded` is the result.
    Raises as `track_ai_usage`; wrong arguments are refused before the block begins.
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
        """Set the usage of the call; the last call of `set` counts. `model_name` None: the name given to `ai_usage`.

        `response_time_ms` None: the time from the beginning of the block until now. Raises `InvalidInputError`, also
        after the block, because its usage is recorded by then.
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
        """Record the failed call, which cost no tokens. If that fails too, the block's own error is still raised."""
        figures = _Figures.of(0, 0, None, self._model_name, self._elapsed_ms())
        try:
            self.recorded = _record(self._fixed, figures, success=False, error=said)
        except (TrueupError, DBAPIError) as not_recorded:
            error.add_note(f"This failed call is not in the usage log: {reason_of(not_recorded)}")


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """The checked arguments that are known before the call."""

    user_id: UserId
    section: str
    key: str
    metadata: dict[str, Any]
    created_at: datetime | None

    @classmethod
    def of(cls, user: Any, *, section: object, key: object, metadata: object, created_at: datetime | None) -> "_Fixed":
        user_id = user_id_of(user)
        if user_id is None:
            raise InvalidInputError("user: it has no id, so the usage was not recorded. Give a saved user or its id.")
        if created_at is not None and (not isinstance(created_at, datetime) or created_at.tzinfo is None):
            raise InvalidInputError(f"created_at: {created_at!r} is not a datetime with a time zone. Give one.")
        return cls(
            user_id=user_id,
            section=check_section(section),
            key=check_key(key),
            metadata=check_metadata(metadata),
            created_at=created_at,
        )


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """The checked figures of a call."""

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
        raise InvalidInputError(f"model_name: {name!r:.80} is not a string. Give the model's name.")
    return storable_text(name)[:MAX_MODEL_NAME]


_RECORD_SQL = """
    SELECT at, recorded, differs, in_future, too_large, log_id, owed_because
    FROM trueup.record_usage(:user_id, :task_id, :call_key, :log_id, :section, :prompt_tokens, :completion_tokens,
                             :total_tokens, :response_time_ms, :success, :model_name, :error, CAST(:metadata AS jsonb),
                             CAST(:created_at AS timestamptz), make_interval(secs => :skew_seconds), NULL)
    """
_RECORD = text(_RECORD_SQL)
_RECORD_WITH_EVENT = with_event(_RECORD_SQL, is_report=True)


def _record(fixed: _Fixed, figures: _Figures, *, success: bool, error: str | None) -> TrackedUsage:
    # A failed call has a key of its own, so that the host's next try may use the same key.
    call_key = f"{'call' if success else 'failed'}:{fixed.key}"
    values = {
        "user_id": fixed.user_id,
        "task_id": TASK_ID,
        "call_key": call_key,
        "log_id": log_id_of(fixed.user_id, TASK_ID, call_key),
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
    what = f"user={fixed.user_id} key={fixed.key!r} tokens={figures.total_tokens}"
    row = retry_until_recorded(_writing(values, what), what)
    deliver_soon()
    if row.in_future:
        raise InvalidInputError(
            f"created_at: {fixed.created_at} is later than the database's clock, so nothing was recorded. Give the "
            "time of the call, or leave it out for now."
        )
    if row.too_large:
        raise too_large(row.too_large)
    if row.owed_because is not None:
        log_owed(what, row.owed_because)
    if row.differs:
        logger.warning("usage reported again with other figures, the first report stays %s", what)
    return TrackedUsage(
        recorded=row.recorded, differs=row.differs, log_id=row.log_id, owed=row.owed_because is not None
    )


def _writing(values: dict[str, Any], what: str) -> Callable[[Connection], Any]:
    def write(connection: Connection) -> Any:
        require_section(connection, get_settings().host, values["section"])
        # A failed call costs nothing, so it is no event.
        has_event = values["success"] and get_settings().on_charge is not None
        try:
            return connection.execute(_RECORD_WITH_EVENT if has_event else _RECORD, values).one()
        except IntegrityError as error:
            if not isinstance(error.orig, ForeignKeyViolation):
                raise
            raise UnknownUserError(
                f"user: the host has no user with this id, so the usage was not recorded ({what}). Check the id."
            ) from error

    return write
