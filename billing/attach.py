"""Set up trueup beside a host that is running: in small steps, none of which is in the host's way for long.

Tables, then the triggers, then the balances from the log, then, once those agree with the log, the functions that the
gate runs by. Until then every gate refuses. What is done is read from the database itself: interrupted, it goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from billing.doctor.installation import expected_functions
from billing.errors import NotInstalledError, TrueupError
from billing.install import (
    ATTACHING,
    SQL_FILES,
    create_tables,
    drop_functions,
    run_scripts,
    save_installation,
    sql_scripts,
)
from billing.mapping import HostMapping, quote_table, render_statement
from billing.short_locks import PATIENCE_SECONDS, take_step

BATCH_USERS = 1_000
SAMPLE_USERS = 1_000

LOG_TRIGGERS = ("trueup_inserted", "trueup_updated", "trueup_deleted", "trueup_truncated")
WINDOW_TRIGGERS = ("trueup_window_changed",)

# Whatever the triggers and the filling need; nothing of the gate's is among it.
BEFORE_TRIGGERS = SQL_FILES[: SQL_FILES.index("triggers.sql")]
FUNCTIONS = tuple(name for name in SQL_FILES if name not in ("triggers.sql", "window_triggers.sql"))


class AttachError(TrueupError):
    """What was built does not agree with the host's log, or is not in place. The gate stays closed."""


@dataclass(frozen=True, kw_only=True)
class AttachPlan:
    """What there is to do. Rows as the server estimates them; `lacking`: rights that the role has not."""

    log: str
    subscriptions: str
    tables_there: bool
    log_watched: bool
    subscriptions_watched: bool
    log_rows: int
    subscription_rows: int
    lacking: tuple[str, ...]


def plan_attach(connection: Connection, mapping: HostMapping) -> AttachPlan:
    """Return what there is to do. Raises `NotInstalledError` when a mapped table is not there."""
    log, subscriptions = quote_table(mapping.usage_log.table), quote_table(mapping.subscription.table)
    for table in (log, subscriptions):
        if connection.scalar(text("SELECT to_regclass(:table) IS NULL"), {"table": table}):
            raise NotInstalledError(f"The database has no table {table}. Map the host's names in trueup.toml.")
    there = bool(connection.scalar(text("SELECT to_regclass('trueup.installation') IS NOT NULL")))
    rows = {table: connection.scalar(_ROWS, {"table": table}) or 0 for table in (log, subscriptions)}
    return AttachPlan(
        log=mapping.usage_log.table,
        subscriptions=mapping.subscription.table,
        tables_there=there,
        log_watched=_is_watched(connection, log, LOG_TRIGGERS),
        subscriptions_watched=_is_watched(connection, subscriptions, WINDOW_TRIGGERS),
        log_rows=rows[log],
        subscription_rows=rows[subscriptions],
        lacking=tuple(connection.scalars(_LACKING, {"log": log, "subscriptions": subscriptions})),
    )


Tell = Callable[[str], Any]


def attach(
    mapping: HostMapping, *, tell: Tell = lambda _: None, patience_seconds: float = PATIENCE_SECONDS
) -> dict[str, int]:
    """Make the database ready for this mapping; return how many balances were built. Safe to repeat and to interrupt.

    `tell` is given a line after each step. Raises `NotInstalledError` for a host that does not fit, `HostBusyError`,
    and `AttachError` when what was built does not hold; then the gate stays closed.
    """
    log, subscriptions = quote_table(mapping.usage_log.table), quote_table(mapping.subscription.table)

    def take(step: Callable[[Connection], None], tables: list[str], done: str) -> None:
        take_step(step, tables, patience_seconds=patience_seconds)
        tell(done)

    take(lambda connection: prepare(connection, mapping), [], "Tables are there.")
    take(lambda connection: watch_log(connection, mapping), [log], f"Triggers on {mapping.usage_log.table} are there.")
    done = f"The trigger on {mapping.subscription.table} is there."
    take(lambda connection: watch_subscriptions(connection, mapping), [subscriptions], done)
    filled = fill(patience_seconds=patience_seconds)
    tell(f"Balances are built: {filled}.")
    take(lambda connection: open_gate(connection, mapping), [], "Balances agree with the log: ready.")
    return {"balances": filled}


def prepare(connection: Connection, mapping: HostMapping) -> None:
    """Make the tables; and close the gate, unless all that the host has written was counted for this mapping.

    Then tables and functions are of this version at once, and the gate goes on.
    """
    create_tables(connection, mapping)
    if _all_watched(connection, mapping) and _is_counted(connection, mapping):
        drop_functions(connection)
        run_scripts(connection, sql_scripts(mapping, FUNCTIONS))
        return
    connection.execute(_CLOSE, {"attaching": ATTACHING})
    drop_functions(connection)
    # With these, triggers that are there count by this mapping: what was counted before is stale.
    connection.execute(_MARK_STALE)
    run_scripts(connection, sql_scripts(mapping, BEFORE_TRIGGERS))


def watch_log(connection: Connection, mapping: HostMapping) -> None:
    """Put the triggers on the log, unless they are at work; each balance from before is stale then."""
    if not _is_watched(connection, quote_table(mapping.usage_log.table), LOG_TRIGGERS):
        connection.execute(_MARK_STALE)
        run_scripts(connection, sql_scripts(mapping, ["triggers.sql"]))


def watch_subscriptions(connection: Connection, mapping: HostMapping) -> None:
    """Put the trigger on the subscriptions, unless it is at work."""
    if not _is_watched(connection, quote_table(mapping.subscription.table), WINDOW_TRIGGERS):
        run_scripts(connection, sql_scripts(mapping, ["window_triggers.sql"]))


def fill(*, batch_users: int = BATCH_USERS, patience_seconds: float = PATIENCE_SECONDS) -> int:
    """Build each stale balance from the log, so many users in a transaction. Returns how many were built."""
    last: Any = None
    filled: int = 0
    while True:
        values = {"after": last, "limit": batch_users}
        row = take_step(_fill_batch(values), patience_seconds=patience_seconds)
        filled += int(row.filled)
        last = row.last
        if last is None:
            return filled


def open_gate(connection: Connection, mapping: HostMapping) -> None:
    """Make the functions that the gate runs by, and write down that all is ready, if what was built holds.

    Raises `AttachError`; nothing is made then.
    """
    if not _all_watched(connection, mapping):
        raise AttachError(
            "A trigger is missing or disabled again. The gate stays closed. Run `trueup db attach` again."
        )
    wrong = connection.execute(render_statement(_UNTRUE, mapping), {"users": SAMPLE_USERS}).scalars().all()
    if wrong:
        raise AttachError(
            f"Balances do not agree with the log, those of {', '.join(map(str, wrong[:5]))} among them. The gate stays "
            "closed. Look for triggers or rules of the host's own that change rows as they are logged."
        )
    drop_functions(connection)
    run_scripts(connection, sql_scripts(mapping, FUNCTIONS))
    save_installation(connection, mapping)


def _fill_batch(values: dict[str, Any]) -> Callable[[Connection], Row[Any]]:
    return lambda connection: connection.execute(_FILL, values).one()


def _all_watched(connection: Connection, mapping: HostMapping) -> bool:
    return _is_watched(connection, quote_table(mapping.usage_log.table), LOG_TRIGGERS) and _is_watched(
        connection, quote_table(mapping.subscription.table), WINDOW_TRIGGERS
    )


def _is_watched(connection: Connection, table: str, triggers: tuple[str, ...]) -> bool:
    """Return whether the table has all these triggers of ours, at work."""
    there: int = connection.execute(_AT_WORK, {"table": table, "names": list(triggers)}).scalar_one()
    return there == len(triggers)


def _is_counted(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether the triggers have counted by this mapping: its own functions, or an older version's of them."""
    if connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation")) == mapping.fingerprint():
        return True
    wanted = {pair for pair in expected_functions(mapping) if pair[0].startswith("append_")}
    return wanted == {(row.name, row.body) for row in connection.execute(_TRIGGER_FUNCTIONS)}


_FILL = text("SELECT last, filled FROM trueup.fill_balances(:after, :limit)")

_CLOSE = text("UPDATE trueup.installation SET mapping_fingerprint = :attaching")

_MARK_STALE = text(
    "INSERT INTO trueup.log_truncation (truncated_at) SELECT clock_timestamp() "
    "WHERE EXISTS (SELECT FROM trueup.balance)"
)

_ROWS = text(
    "SELECT CAST(sum(greatest(c.reltuples, 0)) AS bigint) FROM pg_class c WHERE c.oid = to_regclass(:table) "
    "OR c.oid IN (SELECT relid FROM pg_partition_tree(to_regclass(:table)) WHERE isleaf)"
)

_AT_WORK = text(
    """
    SELECT count(*) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE g.tgrelid = to_regclass(:table) AND g.tgenabled IN ('O', 'A') AND g.tgname = ANY (CAST(:names AS text[]))
      AND p.pronamespace = to_regnamespace('trueup')
    """
)

_TRIGGER_FUNCTIONS = text(
    """
    SELECT CAST(proname AS text) AS name, md5(convert_to(prosrc, 'UTF8')) AS body FROM pg_proc
    WHERE pronamespace = to_regnamespace('trueup') AND prorettype = CAST('trigger' AS regtype)
    """
)

_LACKING = text(
    """
    SELECT 'CREATE ON DATABASE ' || quote_ident(current_database())
    WHERE to_regnamespace('trueup') IS NULL AND NOT has_database_privilege(current_database(), 'CREATE')
    UNION ALL
    SELECT 'to own SCHEMA trueup' FROM pg_namespace WHERE nspname = 'trueup' AND NOT pg_has_role(nspowner, 'USAGE')
    UNION ALL
    SELECT 'TRIGGER ON TABLE ' || t FROM unnest(ARRAY[CAST(:log AS text), CAST(:subscriptions AS text)]) t
    WHERE NOT has_table_privilege(t, 'TRIGGER')
    """
)

# One statement, one snapshot: a log row and its delta are seen together.
_UNTRUE = """
    SELECT b.user_id
    FROM (SELECT * FROM trueup.balance WHERE log_epoch = trueup.log_epoch() ORDER BY random() LIMIT :users) b
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(d.tokens), 0) AS tokens FROM trueup.usage_delta d
        WHERE d.user_id = b.user_id AND d.used_at >= b.window_start) d
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(l.{{usage_log.total_tokens}}), 0) AS tokens FROM {{usage_log}} l
        WHERE l.{{usage_log.user_id}} = b.user_id AND l.{{usage_log.success}}
          AND l.{{usage_log.created_at}} >= b.window_start) l
    WHERE b.consumed + d.tokens <> l.tokens
"""
