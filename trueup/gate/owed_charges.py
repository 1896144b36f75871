"""Owed charges: usage that a provider was paid for, and whose row is not in the host's log.

The log refused the row, or the host writes its rows itself and has not written this one yet.
"""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId

SETTLE_LIMIT = 1000
"""How many owed charges one call of `settle_owed_charges` tries at most."""


@dataclass(frozen=True, kw_only=True)
class OwedCharge:
    """An owed charge. `tokens`: 0 for a failed call. `refusal`: SQLSTATE and message of the last try."""

    user_id: UserId
    task_id: str
    call_key: str
    tokens: int
    refusal: str
    tries: int
    owed_since: datetime


_LIST = text(
    """
    SELECT user_id, task_id, call_key, CASE WHEN success THEN total_tokens ELSE 0 END AS tokens,
           sqlstate || ' ' || refusal AS refusal, tries, owed_since
    FROM trueup.owed_charge ORDER BY owed_since, user_id, task_id, call_key LIMIT :limit
    """
)


def list_owed_charges(connection: Connection, *, limit: int = 100) -> list[OwedCharge]:
    """Return the owed charges, oldest first, at most `limit`."""
    return [OwedCharge(**row) for row in connection.execute(_LIST, {"limit": limit}).mappings()]


_DUE = text("SELECT user_id, task_id, call_key FROM trueup.owed_charge ORDER BY tried_at, user_id LIMIT :limit")
_SETTLE = text("SELECT trueup.settle_owed_charge(:user_id, :task_id, :call_key, :now)")


def settle_owed_charges(
    connection: Connection, *, limit: int = SETTLE_LIMIT, now: datetime | None = None
) -> tuple[int, int]:
    """Try again to write the log rows of owed charges, the longest untried first.

    On a connection on which each statement is its own transaction, so that one refusal keeps no other charge back.
    Idempotent: a charge that another process has settled counts as settled. `now` None: the database's clock.
    Returns how many are settled, and how many the host refused again.
    """
    due = connection.execute(_DUE, {"limit": limit}).mappings().all()
    settled = sum(bool(connection.scalar(_SETTLE, {**row, "now": now})) for row in due)
    return settled, len(due) - settled
