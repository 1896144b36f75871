"""The state of gate and reconciliation: gauges that are cheap to read often, and a status of the last hours."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.gate.provider_calls import IS_UNRECORDED
from trueup.usage.outbox import count_unresolved_effects

# Gauge names and descriptions. Their queries are cheap: open holds, call intents and runs are indexed or few.
FIGURES = {
    "holds_open": "Open holds.",
    "tokens_held": "Tokens set aside by open holds.",
    "oldest_hold_seconds": "Age of the oldest open hold.",
    "unrecorded_calls": "Provider calls that began and were never recorded.",
    "unrecorded_tokens_bound": "The most tokens that unrecorded provider calls can have cost.",
    "owed_charges": "Charges whose row the usage log refused.",
    "owed_tokens": "Tokens of owed charges. They count against the budgets.",
    "charge_events": "Charges of which the host's function has not been told.",
    "oldest_charge_event_seconds": "Age of the oldest of these charges.",
    "last_reconcile_age_seconds": "Time since the last reconcile run over all users finished.",
    "last_deep_reconcile_age_seconds": "Time since the last deep reconcile run finished.",
    "last_reconcile_in_review": "Drifts that the last reconcile run left for review.",
    "last_reconcile_tokens_overstated": "Used tokens that counters still showed, found by the last reconcile run.",
    "last_reconcile_tokens_understated": "Unused tokens that counters did not show, found by the last reconcile run.",
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """Figures of now and of the last `hours`. Tokens are counts, times are seconds; None: no such event.

    `settlement_lag_*`: time from opening a hold to a charge against it. `tokens_over_hold`: tokens charged beyond
    their hold, because a provider billed more than was requested. `overdraft_*`: users beyond their budget, and their
    tokens beyond it. `unrecorded_*`: calls that began and were never recorded, and the most they can have cost.
    `owed_*`: charges whose row the usage log refused, and their tokens. `charge_events`: charges of which the host's
    function (`TRUEUP_ON_CHARGE`) has not been told. `observed_*`: tasks that a gate in mode
    `observe` would have denied, and the tokens they requested.
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
    owed_charges: int
    owed_tokens: int
    charge_events: int
    oldest_charge_event_seconds: float | None
    unknown_effects: int
    observed_denials: int
    observed_denial_tokens: int
    last_reconcile: datetime | None


_OPEN = """open AS (
        SELECT count(*) AS holds, coalesce(sum(h.tokens_reserved - h.tokens_covered), 0) AS tokens,
               min(h.opened_at) AS oldest
        FROM trueup.hold h WHERE h.status = 'open'
    )"""

_UNRECORDED = f"""unrecorded AS (
        SELECT count(*) AS calls, coalesce(sum(c.tokens_bound), 0) AS tokens
        FROM trueup.call_intent c WHERE {IS_UNRECORDED}
    )"""

_OWED = """owed AS (
        SELECT count(*) AS charges, coalesce(sum(o.total_tokens) FILTER (WHERE o.success), 0) AS tokens
        FROM trueup.owed_charge o
    )"""

_EVENTS = """events AS (SELECT count(*) AS count, min(e.charged_at) AS oldest FROM trueup.charge_event e)"""

# Overdrafts are read from the balances, without the log. A balance is exact except for deltas not yet folded into it.
_READ_STATUS = text(
    f"""
    WITH clock AS (
        SELECT t.now, t.now - make_interval(hours => :hours) AS since
        FROM (SELECT coalesce(CAST(:now AS timestamptz), clock_timestamp()) AS now) t
    ), {_OPEN}, ended AS (
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
    ), {_UNRECORDED}, {_OWED}, {_EVENTS}
    SELECT clock.now, open.holds AS open_holds, open.tokens AS tokens_held,
           extract(epoch FROM clock.now - open.oldest) AS oldest_hold_seconds, ended.holds AS expired_holds,
           charged.charges, charged.tokens AS tokens_charged, charged.late AS late_charges,
           charged.over AS tokens_over_hold, charged.median AS settlement_lag_median_seconds,
           charged.p95 AS settlement_lag_p95_seconds, overdrawn.users AS overdraft_users,
           overdrawn.tokens AS overdraft_tokens, unrecorded.calls AS unrecorded_calls,
           unrecorded.tokens AS unrecorded_tokens_bound, owed.charges AS owed_charges, owed.tokens AS owed_tokens,
           events.count AS charge_events, extract(epoch FROM clock.now - events.oldest) AS oldest_charge_event_seconds,
           observed.denials AS observed_denials, observed.tokens AS observed_denial_tokens,
           (SELECT max(r.finished_at) FROM trueup.reconcile_run r WHERE r.status = 'finished') AS last_reconcile
    FROM clock, open, ended, charged, overdrawn, observed, unrecorded, owed, events
    """
)


_READ_GAUGES = text(
    f"""
    WITH clock AS (SELECT clock_timestamp() AS now), {_OPEN}, {_UNRECORDED}, {_OWED}, {_EVENTS}, run AS (
        SELECT r.* FROM trueup.reconcile_run r WHERE r.status = 'finished' AND r.only_user IS NULL AND NOT r.dry_run
    ), latest AS (
        SELECT run.finished_at, run.in_review, run.tokens_overstated, run.tokens_understated
        FROM run ORDER BY run.id DESC LIMIT 1
    )
    SELECT open.holds AS holds_open, open.tokens AS tokens_held,
           extract(epoch FROM clock.now - open.oldest) AS oldest_hold_seconds,
           unrecorded.calls AS unrecorded_calls, unrecorded.tokens AS unrecorded_tokens_bound,
           owed.charges AS owed_charges, owed.tokens AS owed_tokens,
           events.count AS charge_events, extract(epoch FROM clock.now - events.oldest) AS oldest_charge_event_seconds,
           extract(epoch FROM clock.now - latest.finished_at) AS last_reconcile_age_seconds,
           extract(epoch FROM clock.now - (SELECT run.finished_at FROM run WHERE run.kind = 'deep'
                                           ORDER BY run.id DESC LIMIT 1)) AS last_deep_reconcile_age_seconds,
           latest.in_review AS last_reconcile_in_review, latest.tokens_overstated AS last_reconcile_tokens_overstated,
           latest.tokens_understated AS last_reconcile_tokens_understated
    FROM clock CROSS JOIN open CROSS JOIN unrecorded CROSS JOIN owed CROSS JOIN events LEFT JOIN latest ON true
    """
)


def read_status(connection: Connection, *, hours: int = 24, now: datetime | None = None) -> Status:
    """Return the current state and the figures of the last `hours`. `now` None: the database's clock."""
    row = connection.execute(_READ_STATUS, {"hours": hours, "now": now}).mappings().one()
    values: dict[str, Any] = dict(row)
    for name, value in values.items():
        if name.endswith("_seconds"):
            values[name] = None if value is None else float(value)
        elif name not in ("now", "last_reconcile"):
            values[name] = int(value)
    return Status(hours=hours, unknown_effects=count_unresolved_effects(connection, row["now"]), **values)


def read_gauges(connection: Connection) -> dict[str, tuple[float | None, str]]:
    """Return each gauge's value and description. Ages are seconds; None: no such event yet."""
    row = connection.execute(_READ_GAUGES).mappings().one()
    return {name: (None if row[name] is None else float(row[name]), meaning) for name, meaning in FIGURES.items()}
