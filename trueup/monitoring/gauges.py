"""A few figures of how the books stand now, cheap enough to be read every few seconds."""

from sqlalchemy import Connection, text

# Each: what it is called, what it means. Open holds, calls begun and runs have indexes of their own or are few.
FIGURES = {
    "holds_open": "Holds that are open.",
    "tokens_held": "Tokens set aside by open holds.",
    "oldest_hold_seconds": "Age of the oldest open hold.",
    "unrecorded_calls": "Calls of a provider that were begun and never recorded.",
    "unrecorded_tokens_bound": "What those may have cost at most.",
    "last_reconcile_age_seconds": "Time since the last reconcile run over all users that finished.",
    "last_deep_reconcile_age_seconds": "Time since the last deep one.",
    "last_reconcile_in_review": "Drifts that it left to people.",
    "last_reconcile_tokens_overstated": "Tokens shown to users though they were gone, as it found.",
    "last_reconcile_tokens_understated": "Tokens left but not shown, as it found.",
}

_READ = text(
    """
    WITH clock AS (SELECT clock_timestamp() AS now), open AS (
        SELECT count(*) AS holds, coalesce(sum(h.tokens_reserved - h.tokens_covered), 0) AS tokens,
               min(h.opened_at) AS oldest
        FROM trueup.hold h WHERE h.status = 'open'
    ), unrecorded AS (
        SELECT count(*) AS calls, coalesce(sum(c.tokens_bound), 0) AS tokens
        FROM trueup.call_intent c
        WHERE c.outcome = 'unknown' OR NOT EXISTS (
            SELECT FROM trueup.hold h WHERE h.user_id = c.user_id AND h.task_id = c.task_id AND h.status = 'open')
    ), run AS (
        SELECT r.* FROM trueup.reconcile_run r WHERE r.status = 'finished' AND r.only_user IS NULL AND NOT r.dry_run
    ), latest AS (
        SELECT run.finished_at, run.in_review, run.tokens_overstated, run.tokens_understated
        FROM run ORDER BY run.id DESC LIMIT 1
    )
    SELECT open.holds AS holds_open, open.tokens AS tokens_held,
           extract(epoch FROM clock.now - open.oldest) AS oldest_hold_seconds,
           unrecorded.calls AS unrecorded_calls, unrecorded.tokens AS unrecorded_tokens_bound,
           extract(epoch FROM clock.now - latest.finished_at) AS last_reconcile_age_seconds,
           extract(epoch FROM clock.now - (SELECT run.finished_at FROM run WHERE run.kind = 'deep'
                                           ORDER BY run.id DESC LIMIT 1)) AS last_deep_reconcile_age_seconds,
           latest.in_review AS last_reconcile_in_review, latest.tokens_overstated AS last_reconcile_tokens_overstated,
           latest.tokens_understated AS last_reconcile_tokens_understated
    FROM clock CROSS JOIN open CROSS JOIN unrecorded LEFT JOIN latest ON true
    """
)


def read_gauges(connection: Connection) -> dict[str, tuple[float | None, str]]:
    """Return each figure with what it means; ages are seconds, None where there has been nothing."""
    row = connection.execute(_READ).mappings().one()
    return {name: (None if row[name] is None else float(row[name]), meaning) for name, meaning in FIGURES.items()}
