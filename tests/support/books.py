"""Checks of the invariants on the database. A test may run them after any commit."""

from tests.support.host import Host
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_statement

# One statement has one snapshot. A balance of an older epoch is known to be stale, so its figures are not compared.
_MISMATCHED_BALANCES = """
    SELECT b.user_id, b.consumed, d.tokens AS deltas, l.tokens AS logged
    FROM trueup.balance b
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(tokens), 0) AS tokens FROM trueup.usage_delta
        WHERE user_id = b.user_id AND used_at >= b.window_start) d
    CROSS JOIN LATERAL (
        SELECT coalesce(sum({{ usage_log.total_tokens }}), 0) + (
                   SELECT coalesce(sum(total_tokens), 0) FROM trueup.owed_charge o
                   WHERE o.user_id = b.user_id AND o.success AND o.used_at >= b.window_start) AS tokens
        FROM {{ usage_log }}
        WHERE {{ usage_log.user_id }} = b.user_id AND {{ usage_log.success() }}
          AND {{ usage_log.created_at }} >= b.window_start) l
    WHERE b.log_epoch = trueup.log_epoch() AND b.consumed + d.tokens <> l.tokens
"""

_MISMATCHED_READS = """
    SELECT a.user_id, a.consumed, l.tokens AS logged
    FROM trueup.accounts(clock_timestamp()) a
    CROSS JOIN LATERAL (
        SELECT coalesce(sum({{ usage_log.total_tokens }}), 0) + (
                   SELECT coalesce(sum(total_tokens), 0) FROM trueup.owed_charge o
                   WHERE o.user_id = a.user_id AND o.success AND o.used_at >= a.window_start) AS tokens
        FROM {{ usage_log }}
        WHERE {{ usage_log.user_id }} = a.user_id AND {{ usage_log.success() }}
          AND {{ usage_log.created_at }} >= a.window_start) l
    WHERE a.consumed <> l.tokens
"""

_MISMATCHED_HOLDS = """
    SELECT user_id, coalesce(b.held, 0) AS held, coalesce(h.tokens, 0) AS in_open_holds
    FROM trueup.balance b
    FULL JOIN (
        SELECT user_id, sum(tokens_reserved - tokens_covered) AS tokens FROM trueup.hold
        WHERE status = 'open' GROUP BY user_id) h USING (user_id)
    WHERE coalesce(b.held, 0) <> coalesce(h.tokens, 0)
"""


def assert_true(host: Host, mapping: HostMapping | None = None) -> None:
    """Check I1 (consumed + deltas = log + owed charges, for each balance and read) and I4 (open holds = held)."""
    mapping = mapping or HostMapping()
    for name, statement in (
        ("I1, balances", _MISMATCHED_BALANCES),
        ("I1, reads", _MISMATCHED_READS),
        ("I4", _MISMATCHED_HOLDS),
    ):
        wrong = host.connection.execute(render_statement(statement, mapping)).mappings().all()
        assert not wrong, f"{name}: {[dict(row) for row in wrong]}"


def dump(host: Host) -> dict[str, list[str]]:
    """Return every row of trueup's and the host's tables with its physical version, as proof that none was written."""
    tables = host.execute(
        "SELECT schemaname, tablename FROM pg_tables WHERE schemaname IN ('trueup', 'public') ORDER BY 1, 2"
    ).all()
    return {
        f"{schema}.{table}": list(
            host.execute(f'SELECT t.ctid::text || t.xmin || t::text FROM "{schema}"."{table}" t ORDER BY 1').scalars()
        )
        for schema, table in tables
    }
