"""Charges: the usage of each provider call, recorded exactly once per task and call."""

import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.errors import ForeignKeyViolation
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from trueup.accounts.user_ids import UserId
from trueup.database.calls import call
from trueup.errors import UnknownUserError
from trueup.gate.holds import Hold
from trueup.host.sql import UNCOUNTABLE
from trueup.settings.settings import get_settings
from trueup.telemetry import Value, span
from trueup.usage.charge_events import with_event
from trueup.usage.validation import MAX_MODEL_NAME, storable_text

logger = logging.getLogger(__name__)

# A log row's id is the UUIDv5 of its user, task and call in this namespace, so that a call always gets the same id. If
# the log's ids are integers, its sequence gives the id, and the charge row names the call's log row.
_LOG_NAMESPACE = uuid.UUID("5b0e1c38-3d0b-5a34-9d5c-7d1f4b6f2a90")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The usage of one provider call. Token figures are counts.

    `prompt_tokens`, `completion_tokens`: as billed by the provider. `total_tokens`: what counts against the budget.
    `classes`: the billed tokens by class, such as cached input; None: not known.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    response_time_ms: int
    model_name: str
    classes: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Charge:
    """The result of recording a charge.

    `recorded` False: an earlier delivery recorded it. `late`: the hold has ended or belongs to a later attempt.
    `tokens_over`: tokens that the hold did not cover. `tokens_left`: tokens that the hold still has for this attempt.
    `owed`: the usage log refused the row. The tokens count, and trueup tries again to write the row.
    `closed`: the hold was closed with this charge.
    """

    recorded: bool
    late: bool
    tokens_over: int
    tokens_left: int
    owed: bool = False
    closed: bool = False


_RECORD_SQL = """
    SELECT at, recorded, bought_twice, late, tokens_over, tokens_left, owed_because, closed
    FROM trueup.record_charge(:user_id, :task_id, :attempt, :call_key, :log_id, :section,
                              :prompt_tokens, :completion_tokens, :total_tokens, :response_time_ms, :model_name,
                              CAST(:metadata AS jsonb), CAST(:answer AS jsonb), CAST(:now AS timestamptz),
                              CAST(:classes AS jsonb), :last)
    """
_RECORD = text(_RECORD_SQL)
_RECORD_WITH_EVENT = with_event(_RECORD_SQL)


def record_charge(
    connection: Connection,
    hold: Hold,
    *,
    call_key: str,
    usage: Usage,
    metadata: dict[str, Any] | None = None,
    answer: dict[str, Any] | None = None,
    last: bool = False,
    now: datetime | None = None,
) -> Charge:
    """Record a provider call's usage: log row, charge, hold, balance and counter in one round trip.

    Idempotent by task and `call_key`. `metadata`: stored in the log row. `answer`: the provider's answer, stored for a
    redelivery; None: not stored. `last`: close the hold with the charge, unless another call is in flight or the host
    refuses something. `now` None: the database's clock. Usage is spent money, so a value that the log can't store (a
    count out of its column's range, text with NUL) is changed to fit instead of refused, and a row that the host
    refuses becomes an owed charge.
    Raises `UnknownUserError` when the host has deleted the user: a log row needs a user.
    """
    total_tokens = _countable(usage.total_tokens)
    values = {
        "user_id": hold.user_id,
        "task_id": hold.task_id,
        "attempt": hold.attempt,
        "call_key": call_key,
        "log_id": log_id_of(hold.user_id, hold.task_id, call_key),
        "section": hold.section,
        "prompt_tokens": _countable(usage.prompt_tokens),
        "completion_tokens": _countable(usage.completion_tokens),
        "total_tokens": total_tokens,
        "response_time_ms": _countable(usage.response_time_ms),
        "model_name": storable_text(usage.model_name)[:MAX_MODEL_NAME],
        "metadata": _storable_json(metadata) or "{}",
        "answer": _storable_json(answer),
        "now": now,
        "classes": None if usage.classes is None else json.dumps(dict(usage.classes)),
        "last": last,
    }
    about: dict[str, Value] = {"trueup.feature": hold.feature_name, "trueup.task_id": hold.task_id}
    try:
        with span("trueup.charge", about | {"trueup.tokens.charged": total_tokens}) as traced:
            row = _record(connection, hold, values)
            traced.set({"trueup.charge.recorded": row.recorded, "trueup.charge.late": row.late})
    except IntegrityError as error:
        if not isinstance(error.orig, ForeignKeyViolation):
            raise
        raise UnknownUserError(
            f"user: the host has deleted user {hold.user_id}, so {total_tokens} tokens of task {hold.task_id} are not "
            "in the usage log. Keep this message if you account for them elsewhere."
        ) from error
    if row.owed_because is not None:
        log_owed(f"user={hold.user_id} task={hold.task_id} call={call_key} tokens={total_tokens}", row.owed_because)
    return Charge(
        recorded=row.recorded,
        late=row.late,
        tokens_over=row.tokens_over,
        tokens_left=row.tokens_left,
        owed=row.owed_because is not None,
        closed=bool(row.closed),
    )


def _record(connection: Connection, hold: Hold, values: dict[str, Any]) -> Any:
    statement = _RECORD
    if get_settings().on_charge is not None:
        statement, values["feature_name"] = _RECORD_WITH_EVENT, storable_text(hold.feature_name)
    [row] = call(connection, statement, values)
    if row.bought_twice:
        # Two attempts made the same call, and the provider billed both. Both are recorded, each with its answer,
        # because the answer of the other attempt may be incomplete.
        own_key = f"{values['call_key']}~{hold.attempt}"
        own = values | {"call_key": own_key, "log_id": log_id_of(hold.user_id, hold.task_id, own_key)}
        [row] = call(connection, statement, own)
    return row


# How the refusal of a charge begins while the host has not written its row yet (`usage_log.record`).
AWAITED = "TU003 "


def log_owed(what: str, refusal: str) -> None:
    """Log that a charge is owed. `what`: the charge, as `key=value`."""
    if refusal.startswith(AWAITED):
        logger.debug("the charge counts until the host has logged the call %s", what)
        return
    logger.error(
        "the usage log refused a row, the charge is owed: its tokens count, and the row is tried again %s refusal=%r",
        what,
        refusal,
    )


def log_id_of(user_id: UserId, task_id: str, call_key: str) -> str:
    """Return the id of a call's log row, which is also the key of its charge event."""
    return str(uuid.uuid5(_LOG_NAMESPACE, json.dumps([str(user_id), task_id, call_key])))


def _countable(figure: int) -> int:
    return max(0, min(figure, UNCOUNTABLE))


def _storable_json(value: dict[str, Any] | None) -> str | None:
    """Return the value as JSON. None: there is no value, or jsonb cannot store it."""
    if value is None:
        return None
    try:
        content = json.dumps(value, ensure_ascii=False, allow_nan=False)
        content.encode()
    except ValueError:  # an infinite number or NaN, or a lone surrogate
        return None
    return None if "\\u0000" in content else content


_FIND_ANSWER = text(
    """
    SELECT answer FROM trueup.charge
    WHERE user_id = :user_id AND task_id = :task_id AND answer IS NOT NULL
      AND (call_key = :call_key OR starts_with(call_key, CAST(:call_key AS text) || '~'))
    ORDER BY charged_at, call_key LIMIT 1
    """
)


def find_answer(connection: Connection, hold: Hold, call_key: str) -> dict[str, Any] | None:
    """Return the stored answer of a call that this task has paid for. None: it is not paid for, or not stored."""
    answer: dict[str, Any] | None = connection.execute(
        _FIND_ANSWER,
        {"user_id": hold.user_id, "task_id": hold.task_id, "call_key": call_key},
    ).scalar_one_or_none()
    return answer


_FIND_NUMBERS = text(
    "SELECT call_key FROM trueup.charge "
    "WHERE user_id = :user_id AND task_id = :task_id AND starts_with(call_key, CAST(:prefix AS text))"
)


def charged_numbers(connection: Connection, hold: Hold, prefix: str) -> frozenset[int]:
    """Return the numbers of the charged calls of this task whose keys begin with `prefix`. A number follows it."""
    keys = connection.execute(
        _FIND_NUMBERS, {"user_id": hold.user_id, "task_id": hold.task_id, "prefix": prefix}
    ).scalars()
    return frozenset(int(key[len(prefix) :].partition("~")[0]) for key in keys)


_PRUNE = text(
    "SELECT trueup.prune_answers("
    "coalesce(CAST(:now AS timestamptz), clock_timestamp()) - CAST(:age AS interval), :limit)"
)


def prune_answers(connection: Connection, *, older_than: timedelta, limit: int, now: datetime | None = None) -> int:
    """Delete stored answers older than `older_than`, at most `limit`; the charges stay. Returns how many were deleted.

    `now` None: the database's clock.
    """
    pruned: int = connection.execute(_PRUNE, {"age": older_than, "limit": limit, "now": now}).scalar_one()
    return pruned
