"""Charges: each provider call's real usage, written exactly once per task and call."""

import json
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from billing.holds import Hold

# A log row's id is the UUIDv5 of its task and call under this namespace: the same call always gets the same id.
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
    SELECT recorded, late, tokens_over, tokens_left
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
    not kept). `now`: None means the database's clock.
    """
    row = connection.execute(
        _RECORD,
        {
            "user_id": hold.user_id,
            "task_id": hold.task_id,
            "attempt": hold.attempt,
            "call_key": call_key,
            "log_id": str(uuid.uuid5(LOG_NAMESPACE, f"{hold.task_id}/{call_key}")),
            "section": hold.section,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "response_time_ms": min(usage.response_time_ms, MAX_LOG_TOKENS),
            "model_name": usage.model_name[:_MAX_MODEL_NAME],
            "metadata": json.dumps(metadata or {}),
            "answer": None if answer is None else json.dumps(answer),
            "now": now,
        },
    ).one()
    return Charge(
        recorded=row.recorded,
        late=row.late,
        tokens_over=row.tokens_over,
        tokens_left=row.tokens_left,
    )


_FIND_ANSWER = text(
    """
    SELECT answer FROM trueup.charge
    WHERE user_id = :user_id AND task_id = :task_id AND call_key = :call_key AND answer IS NOT NULL
    """
)


def find_answer(connection: Connection, hold: Hold, call_key: str) -> dict[str, Any] | None:
    """Return the provider's answer that this task has already paid for; None if it has not, or it was not kept."""
    answer: dict[str, Any] | None = connection.execute(
        _FIND_ANSWER,
        {"user_id": hold.user_id, "task_id": hold.task_id, "call_key": call_key},
    ).scalar_one_or_none()
    return answer
