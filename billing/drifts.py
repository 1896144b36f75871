"""Finding drift: counters compared with balances, and what the log says of the difference. Nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from billing.mapping import UserIdType
from billing.users import UserId


@dataclass(frozen=True, kw_only=True)
class SameSizeRows:
    """Log rows in the window that alone are as large as a drift: how many, and the newest three."""

    matches: int = 0
    newest: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A counter that differs from what remains. Token figures are counts.

    `observed`: the counter as seen, None if it was null. `expected`: max(0, original - consumed). `end_date` None:
    unlimited. `counted_rows` and `failed_rows`: rows with and without `success` that are as large as the drift.
    """

    user_id: UserId
    subscription_id: str
    is_active: bool
    end_date: datetime | None
    original: int
    consumed: int
    observed: int | None
    expected: int
    counted_rows: SameSizeRows
    failed_rows: SameSizeRows

    @property
    def tokens(self) -> int:
        """observed - expected, a null counter read as 0. Positive: the user is shown tokens that are gone."""
        return (self.observed or 0) - self.expected


# One statement, so that a drift and its evidence are of one snapshot.
_FIND = """
    WITH drifted AS MATERIALIZED (
        SELECT a.user_id, a.subscription_id, a.is_active, a.window_start, a.end_date, a.original, a.consumed,
               a.counter AS observed, greatest(a.original - a.consumed, 0) AS expected
        FROM trueup.accounts(CAST(:now AS timestamptz)) a
        WHERE a.user_id = ANY (CAST(:user_ids AS {user_id_type}[]))
          AND a.counter IS DISTINCT FROM greatest(a.original - a.consumed, 0)
    ), same_size AS (
        SELECT r.* FROM (
            SELECT array_agg(user_id) AS users, array_agg(window_start) AS windows,
                   array_agg(abs(coalesce(observed, 0) - expected)) AS tokens
            FROM drifted
        ) d, trueup.rows_of_size(d.users, d.windows, d.tokens) r
    )
    SELECT d.user_id, d.subscription_id, d.is_active, d.end_date, d.original, d.consumed, d.observed, d.expected,
           c.matches AS counted_matches, c.log_rows AS counted_newest,
           f.matches AS failed_matches, f.log_rows AS failed_newest
    FROM drifted d
    LEFT JOIN same_size c ON c.user_id = d.user_id AND c.counted
    LEFT JOIN same_size f ON f.user_id = d.user_id AND NOT f.counted
    ORDER BY d.user_id
"""


def find_drifts(
    connection: Connection,
    user_ids: Sequence[UserId],
    user_id_type: UserIdType,
    *,
    now: datetime,
) -> list[Drift]:
    """Return the drifts among these users' counters, ordered by user."""
    statement = text(_FIND.format(user_id_type=user_id_type))
    rows = connection.execute(statement, {"user_ids": list(user_ids), "now": now})
    return [_drift(row) for row in rows]


def _drift(row: Any) -> Drift:
    return Drift(
        user_id=row.user_id,
        subscription_id=row.subscription_id,
        is_active=bool(row.is_active),
        end_date=row.end_date,
        original=row.original,
        consumed=row.consumed,
        observed=row.observed,
        expected=row.expected,
        counted_rows=SameSizeRows(matches=row.counted_matches or 0, newest=row.counted_newest or []),
        failed_rows=SameSizeRows(matches=row.failed_matches or 0, newest=row.failed_newest or []),
    )
