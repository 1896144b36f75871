"""What is at stake now, for the live page: balances that run out, and drifts in review.

Each query has a bound, whatever the size of the host: the page is read every few seconds while someone looks at it.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId

ACTIVE_WITHIN = timedelta(hours=1)
MAX_ACTIVE = 1_000
AT_RISK_PERCENT = 10
MAX_COUNTED = 10_000


@dataclass(frozen=True, kw_only=True)
class AtRisk:
    """The balance of a user who spends now and has little left. Token figures are counts.

    `counter` None: the host's value is null.
    """

    user_id: UserId
    original: int
    consumed: int
    held: int
    counter: int | None

    @property
    def available(self) -> int:
        return self.original - self.consumed - self.held

    @property
    def overdraft(self) -> int:
        return max(0, self.consumed - self.original)


_ACTIVE = """
    active AS (
        SELECT DISTINCT t.user_id FROM (
            (SELECT h.user_id FROM trueup.hold h WHERE h.status = 'open' LIMIT :most)
            UNION ALL
            (SELECT c.user_id FROM trueup.charge c, clock WHERE c.charged_at >= clock.now - :within LIMIT :most)
        ) t
    )
"""
_AT_RISK = text(
    f"""
    WITH clock AS (SELECT coalesce(CAST(:now AS timestamptz), clock_timestamp()) AS now), {_ACTIVE}
    SELECT a.user_id, a.original, a.consumed, a.held, a.counter
    FROM clock, active CROSS JOIN LATERAL (
        SELECT * FROM trueup.accounts((SELECT now FROM clock)) t WHERE t.user_id = active.user_id) a
    WHERE a.plan_kind IS NULL AND a.is_active AND (a.end_date IS NULL OR a.end_date >= clock.now)
      AND (a.original - a.consumed - a.held)::numeric * 100 < a.original::numeric * :percent
    ORDER BY a.original - a.consumed - a.held, a.user_id LIMIT :limit
    """
)


def list_at_risk(connection: Connection, *, limit: int = 20, now: datetime | None = None) -> list[AtRisk]:
    """Return the balances that run out, the emptiest first: less than `AT_RISK_PERCENT` of the plan and grants is left.

    Only users who have a hold, or had a charge within `ACTIVE_WITHIN`, count, at most `MAX_ACTIVE` of each: the balance
    of anyone else does not change. `now` None: the database's clock.
    """
    values = {"now": now, "within": ACTIVE_WITHIN, "most": MAX_ACTIVE, "percent": AT_RISK_PERCENT, "limit": limit}
    return [AtRisk(**row) for row in connection.execute(_AT_RISK, values).mappings()]


_COUNT_REVIEWS = text(
    "SELECT count(*) FROM (SELECT 1 FROM trueup.undecided_drifts(NULL, NULL, NULL, NULL) LIMIT :most) t"
)


def count_reviews(connection: Connection) -> int:
    """Return the number of drifts in review, at most `MAX_COUNTED`."""
    return int(connection.execute(_COUNT_REVIEWS, {"most": MAX_COUNTED}).scalar_one())
