"""How the gate has been doing: holds, charges, how long settling takes, and what a person should look at."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.usage.outbox import count_unresolved_effects


@dataclass(frozen=True, kw_only=True)
class Status:
    """Figures of now and of the last `hours`. Tokens are counts, times in seconds; None where there was nothing.

    `settlement_lag_*`: from opening a hold to a charge against it. `tokens_over_hold`: charged beyond their hold, for
    a provider billed more than it was asked for. `overdraft_*`: users past their budget, and by how much.
    `unrecorded_*`: calls that were begun and never recorded, and what they may have cost at most. `observed_*`: what
    would have been denied, had its feature's gate been enforced, and how many tokens it asked for.
    """

    now: datetime
    hours: int
    open_holds: int
    tokens_held: int
    oldest_hold_seconds: float | None
    expired_holds: int
    charges: int
    tokens_charged: int
    late_charges: int
    tokens_over_hold: int
    settlement_lag_median_seconds: float | None
    settlement_lag_p95_seconds: float | None
    overdraft_users: int
    overdraft_tokens: int
    unrecorded_calls: int
    unrecorded_tokens_bound: int
    unknown_effects: int
    observed_denials: int
    observed_denial_tokens: int
    last_reconcile: datetime | None


# Overdrafts are looked for among the balances alone: no look at the log, and each balance is exact but for deltas
# that wait to be folded.
_READ = text(
    """
    WITH clock AS (
        SELECT t.now, t.now - make_interval(hours => :hours) AS since
        FROM (SELECT coalesce(CAST(:now AS timestamptz), clock_timestamp()) AS now) t
    ), open AS (
        SELECT count(*) AS holds, coalesce(sum(h.tokens_reserved - h.tokens_covered), 0) AS tokens,
               min(h.opened_at) AS oldest
        FROM trueup.hold h WHERE h.status = 'open'
    ), ended AS (
        SELECT count(*) AS holds FROM trueup.hold h, clock WHERE h.status = 'expired' AND h.closed_at >= clock.since
    ), charged AS (
        SELECT count(*) AS charges, coalesce(sum(c.tokens_total), 0) AS tokens,
               count(*) FILTER (WHERE c.late) AS late,
               coalesce(sum(c.tokens_total - c.tokens_covered), 0) AS over,
               percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM c.charged_at - h.opened_at)) AS median,
               percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM c.charged_at - h.opened_at)) AS p95
        FROM clock
        JOIN trueup.charge c ON c.charged_at >= clock.since
        LEFT JOIN trueup.hold h ON h.user_id = c.user_id AND h.task_id = c.task_id AND h.id = c.hold_id
    ), overdrawn AS (
        SELECT count(*) AS users, coalesce(sum(b.consumed - e.original), 0) AS tokens
        FROM clock, trueup.balance b, LATERAL (
            SELECT * FROM trueup.entitlements(clock.now) t WHERE t.user_id = b.user_id) e
        WHERE b.consumed > e.original AND b.window_start = e.window_start AND b.log_epoch = trueup.log_epoch()
    ), observed AS (
        SELECT count(*) AS denials, coalesce(sum(d.tokens), 0) AS tokens
        FROM trueup.observed_denial d, clock WHERE d.denied_at >= clock.since
    ), unrecorded AS (
        SELECT count(*) AS calls, coalesce(sum(c.tokens_bound), 0) AS tokens
        FROM trueup.call_intent c
        WHERE c.outcome = 'unknown' OR NOT EXISTS (
            SELECT FROM trueup.hold h WHERE h.user_id = c.user_id AND h.task_id = c.task_id AND h.status = 'open')
    )
    SELECT clock.now, open.holds AS open_holds, open.tokens AS tokens_held,
           extract(epoch FROM clock.now - open.oldest) AS oldest_hold_seconds, ended.holds AS expired_holds,
           charged.charges, charged.tokens AS tokens_charged, charged.late AS late_charges,
           charged.over AS tokens_over_hold, charged.median AS settlement_lag_median_seconds,
           charged.p95 AS settlement_lag_p95_seconds, overdrawn.users AS overdraft_users,
           overdrawn.tokens AS overdraft_tokens, unrecorded.calls AS unrecorded_calls,
           unrecorded.tokens AS unrecorded_tokens_bound,
           observed.denials AS observed_denials, observed.tokens AS observed_denial_tokens,
           (SELECT max(r.finished_at) FROM trueup.reconcile_run r WHERE r.status = 'finished') AS last_reconcile
    FROM clock, open, ended, charged, overdrawn, observed, unrecorded
    """
)


def read_status(connection: Connection, *, hours: int = 24, now: datetime | None = None) -> Status:
    """Return how things stand, and how they went in the last `hours`. `now`: None means the database's clock."""
    row = connection.execute(_READ, {"hours": hours, "now": now}).mappings().one()
    values: dict[str, Any] = dict(row)
    for name, value in values.items():
        if name.endswith("_seconds"):
            values[name] = None if value is None else float(value)
        elif name not in ("now", "last_reconcile"):
            values[name] = int(value)
    return Status(hours=hours, unknown_effects=count_unresolved_effects(connection, row["now"]), **values)
