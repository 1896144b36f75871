"""Charges: each provider call's real usage, written exactly once per task and call."""

import json
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.errors import ForeignKeyViolation
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from trueup.errors import UnknownUserError
from trueup.gate.holds import Hold

# A log row's id is the UUIDv5 of its user, task and call under this namespace: the same call always gets the same id.
# (A log whose ids are whole numbers draws them from their sequence: there the charge says which row is which call's.)
LOG_NAMESPACE = uuid.UUID("5b0e1c38-3d0b-5a34-9d5c-7d1f4b6f2a90")

MAX_LOG_TOKENS = 2**31 - 1
_MAX_MODEL_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one provider call cost. Token figures are counts, as the provider bills them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    response_time_ms: int
    model_name: str


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What became of a charge.

    `recorded` False: it was there already. `late`: its hold had ended, or belongs to a later attempt. `tokens_over`:
    count that the hold did not cover. `tokens_left`: count the hold still has for this attempt.
    """

    recorded: bool
    late: bool
    tokens_over: int
    tokens_left: int


_RECORD = text(
    """
    SELECT recorded, bought_twice, late, tokens_over, tokens_left
    FROM trueup.record_charge(:user_id, :task_id, :attempt, :call_key, :log_id, :section,
                              :prompt_tokens, :completion_tokens, :total_tokens, :response_time_ms, :model_name,
                              CAST(:metadata AS jsonb), CAST(:answer AS jsonb), CAST(:now AS timestamptz))
    """
)


def record_charge(
    connection: Connection,
    hold: Hold,
    *,
    call_key: str,
    usage: Usage,
    metadata: dict[str, Any] | None = None,
    answer: dict[str, Any] | None = None,
    now: datetime | None = None,
) -> Charge:
    """Write a provider call's usage: log row, charge, hold, balance and counter in one round trip.

    Idempotent by task and `call_key`. `metadata` goes into the log row, `answer` is kept for a redelivered task (None:
    not kept). `now`: None means the database's clock. Usage is spent money: what of it the log can't hold (a figure
    out of range, text that is no text) is brought within its limits rather than refused.
    Raises `UnknownUserError` when the host has deleted the user: then there is nothing to log it under.
    """
    total_tokens = _countable(usage.total_tokens)
    values = {
        "user_id": hold.user_id,
        "task_id": hold.task_id,
        "attempt": hold.attempt,
        "call_key": call_key,
        "log_id": str(_log_id(hold, call_key)),
        "section": hold.section,
        "prompt_tokens": _countable(usage.prompt_tokens),
        "completion_tokens": _countable(usage.completion_tokens),
        "total_tokens": total_tokens,
        "response_time_ms": _countable(usage.response_time_ms),
        "model_name": _storable_text(usage.model_name)[:_MAX_MODEL_NAME],
        "metadata": _storable_json(metadata) or "{}",
        "answer": _storable_json(answer),
        "now": now,
    }
    try:
        row = connection.execute(_RECORD, values).one()
        if row.bought_twice:
            # Two attempts made the same call, and both were served: both are paid for, so both are recorded, each with
            # its answer: that of the other may not have come whole.
            own_key = f"{call_key}~{hold.attempt}"
            own = values | {"call_key": own_key, "log_id": str(_log_id(hold, own_key))}
            row = connection.execute(_RECORD, own).one()
    except IntegrityError as error:
        if not isinstance(error.orig, ForeignKeyViolation):
            raise
        raise UnknownUserError(
            f"user: {hold.user_id} is no longer among the host's users. The {total_tokens} tokens that task "
            f"{hold.task_id} used could not be logged."
        ) from error
    return Charge(
        recorded=row.recorded,
        late=row.late,
        tokens_over=row.tokens_over,
        tokens_left=row.tokens_left,
    )


def _log_id(hold: Hold, call_key: str) -> uuid.UUID:
    return uuid.uuid5(LOG_NAMESPACE, json.dumps([str(hold.user_id), hold.task_id, call_key]))


def _countable(figure: int) -> int:
    return max(0, min(figure, MAX_LOG_TOKENS))


def _storable_text(value: str) -> str:
    """Return the text without what PostgreSQL's can't hold: NUL, and halves of surrogate pairs."""
    return value.replace("\x00", "").encode(errors="replace").decode()


def _storable_json(value: dict[str, Any] | None) -> str | None:
    """Return the value as JSON; None if there is none, or none that jsonb can hold."""
    if value is None:
        return None
    try:
        content = json.dumps(value, ensure_ascii=False, allow_nan=False)
        content.encode()
    except ValueError:  # not a finite number, or half of a surrogate pair
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
    """Return the provider's answer that this task has already paid for; None if it has not, or it was not kept."""
    answer: dict[str, Any] | None = connection.execute(
        _FIND_ANSWER,
        {"user_id": hold.user_id, "task_id": hold.task_id, "call_key": call_key},
    ).scalar_one_or_none()
    return answer


_PRUNE = text(
    "SELECT trueup.prune_answers("
    "coalesce(CAST(:now AS timestamptz), clock_timestamp()) - CAST(:age AS interval), :limit)"
)


def prune_answers(connection: Connection, *, older_than: timedelta, limit: int, now: datetime | None = None) -> int:
    """Forget stored answers that are older, at most `limit`; the charges stay. Returns how many were forgotten.

    `now`: None means the database's clock.
    """
    pruned: int = connection.execute(_PRUNE, {"age": older_than, "limit": limit, "now": now}).scalar_one()
    return pruned
