"""Attach trueup to a running host in steps, each in its own transaction.

The order: tables, triggers, balances from the log, and, once a sample of balances agrees with the log, the gate's
functions. Until then the gate refuses every task; if all is ready already, it stays open. `attach` reads its progress
from the database, so it can be interrupted.

Locks on the host's tables, each waited for 50 ms at most and tried again for a minute: SHARE ROW EXCLUSIVE on the usage
log, its partitions and the subscriptions while triggers are created; ACCESS EXCLUSIVE on a table that was mapped before
while its triggers are dropped; the row locks of a trial write, which is rolled back; ACCESS SHARE while balances are
read from the log. An advisory lock (INSTALL_LOCK) keeps other installers out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sqlalchemy import Connection, Row, text

from trueup.database.locks import (
    INSTALL_LOCK,
    LOCK_TIMEOUT_MILLISECONDS,
    PATIENCE_SECONDS,
    STATEMENT_TIMEOUT_SECONDS,
    take_step,
)
from trueup.database.retry import retrying
from trueup.database.session import SEARCH_PATH
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.partitions import log_tables, uncovered_partitions
from trueup.host.setting_values import quote_literal
from trueup.host.sql import render_sql, render_statement
from trueup.install.baseline import (
    FILL_BASELINE,
    LOG_TRIGGERS,
    SAVE_BASELINE,
    SAVE_TRIGGER_BASELINE,
    WINDOW_TRIGGER,
    are_triggers_unchanged,
    is_installed,
)
from trueup.install.install import (
    DROP_FUNCTIONS,
    SQL_FILES,
    create_tables,
    expected_functions,
    run_scripts,
    save_sql,
    sql_scripts,
    tables_sql,
)
from trueup.install.rights import refuse_without_rights

# A batch reads the log from end to end. So it takes many users: as many as have about so many log rows.
BATCH_ROWS = 10_000_000
MAX_BATCH_USERS = 500_000
SAMPLE_USERS = 1_000

# What the triggers and the filling need; the gate's functions come later.
BEFORE_TRIGGERS = (*SQL_FILES[: SQL_FILES.index("install/triggers.sql")], "install/search_path.sql")
FUNCTIONS = tuple(name for name in SQL_FILES if not name.endswith("triggers.sql"))


class AttachError(TrueupError):
    """A balance does not agree with the host's log, or a trigger is missing. The gate stays closed."""


@dataclass(frozen=True, kw_only=True)
class TriggerStep:
    """A transaction that creates triggers on a table of the host: `attach` runs it, `attach_script` prints it.

    `title`: the heading in the script. `done`: what `attach` reports afterwards, with {table}; None: nothing. `noun`:
    the table that it locks. `is_needed`: whether triggers are missing. `scripts`: the SQL that creates them.
    `keeps_balances`: existing balances stay valid, so the step refuses if trueup's triggers were changed meanwhile.
    """

    title: str
    done: str | None
    noun: Literal["usage_log", "subscription"]
    is_needed: Callable[[Connection, HostMapping], bool]
    scripts: Callable[[HostMapping], list[str]]
    keeps_balances: bool = False

    def table(self, mapping: HostMapping) -> str:
        return str(getattr(mapping, self.noun).table)

    def take(self, connection: Connection, mapping: HostMapping) -> None:
        """Create the triggers, unless they are enabled already."""
        if self.is_needed(connection, mapping):
            if self.keeps_balances:
                _refuse_changed_triggers(connection)
            run_scripts(connection, self.scripts(mapping))


LOG_STEP = TriggerStep(
    title="2. The triggers on the usage log",
    done=None,
    noun="usage_log",
    is_needed=lambda connection, mapping: not has_log_triggers(connection, mapping),
    # The log's triggers have missed rows, so every existing balance is stale.
    scripts=lambda mapping: [_MARK_STALE, *sql_scripts(mapping, ["install/triggers.sql"]), SAVE_BASELINE],
)
PARTITION_STEP = TriggerStep(
    title="2. The triggers on the log's partitions",
    done="Triggers on {table} are there.",
    noun="usage_log",
    is_needed=lambda connection, mapping: _lacks_partition_triggers(connection, mapping),
    scripts=lambda mapping: sql_scripts(mapping, ["install/partition_triggers.sql"]),
)
SUBSCRIPTION_STEP = TriggerStep(
    title="2. The trigger on the subscriptions",
    done="The trigger on {table} is there.",
    noun="subscription",
    is_needed=lambda connection, mapping: _lacks_subscription_trigger(connection, mapping),
    scripts=lambda mapping: [*sql_scripts(mapping, ["install/window_triggers.sql"]), SAVE_TRIGGER_BASELINE],
    keeps_balances=True,
)
TRIGGER_STEPS = (LOG_STEP, PARTITION_STEP, SUBSCRIPTION_STEP)


def attach(
    mapping: HostMapping,
    *,
    report: Callable[[str], Any] = lambda _: None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> dict[str, int]:
    """Make the database ready for this mapping; return how many balances were built. Safe to repeat and to interrupt.

    `report` is called with a line after each step. `patience_seconds`: how long a step keeps retrying for its locks.
    Raises `MissingRightError`, `NotInstalledError` for a host that does not fit, `HostBusyError`, and `AttachError` if
    balances do not agree with the log; the gate stays closed then.
    """
    retrying(lambda connection: refuse_without_rights(connection, mapping))

    def take(step: Callable[[Connection, HostMapping], None], tables: list[str], done: str | None) -> None:
        take_step(lambda connection: step(connection, mapping), tables, patience_seconds=patience_seconds)
        if done is not None:
            report(done)

    ready = retrying(lambda connection: is_ready(connection, mapping))
    take(prepare, [], "Tables are there.")
    for step in TRIGGER_STEPS:
        table = step.table(mapping)
        take(step.take, [quote_table(table)], step.done and step.done.format(table=table))

    def build() -> int:
        users = retrying(lambda connection: batch_users(connection, mapping))
        filled = fill(batch_users=users, patience_seconds=patience_seconds)
        report(f"Balances are built: {filled}.")
        take(open_gate, [], "Balances agree with the log: ready.")
        return filled

    try:
        return {"balances": build()}
    except AttachError:
        if not ready:
            raise
    # The gate was open before. Balances may miss rows that no trigger saw, or count rows of a dropped partition.
    take(close_gate, [], "Balances do not agree with the log. The gate is closed; trueup rebuilds all balances.")
    return {"balances": build()}


def attach_script(connection: Connection, mapping: HostMapping) -> str:
    """Return the SQL that `attach` would run in the database's present state.

    Raises `NotInstalledError` for an unfit host.
    """
    tables = tables_sql(connection, mapping)
    ready = is_ready(connection, mapping)
    parts = [
        _HEAD.format(
            milliseconds=LOCK_TIMEOUT_MILLISECONDS,
            search_path=SEARCH_PATH,
            time_zone=quote_literal(mapping.time_zone or "UTC"),
        ),
        _step("1. Schema, tables and functions of trueup", [*tables, *prepare_scripts(mapping, ready=ready)]),
    ]
    for step in TRIGGER_STEPS:
        if step.is_needed(connection, mapping):
            parts.append(_step(step.title, step.scripts(mapping)))
    users = batch_users(connection, mapping)
    filling = _FILL_SCRIPT.format(
        milliseconds=LOCK_TIMEOUT_MILLISECONDS, lock=INSTALL_LOCK, users=users, user_id_type=mapping.user_id_type
    )
    parts.append(f"-- 3. The balances from the log; each batch commits\n{filling}")
    mismatches = render_sql(_MISMATCHES, mapping).replace(":users", str(SAMPLE_USERS)).strip()
    opening = [_COMPARE.format(mismatches=mismatches), *opening_scripts(mapping, _CHECK_TRIGGERS)]
    parts.append(_step("4. If the balances agree with the log: the gate's functions, and the record", opening))
    return "\n".join(parts)


def _step(title: str, scripts: Sequence[str]) -> str:
    body = "\n".join(script.strip("\n") for script in scripts)
    return f"-- {title}\n{_BEGIN}\n{body}\nCOMMIT;\n"


def prepare(connection: Connection, mapping: HostMapping) -> None:
    """Create the tables, and close the gate unless the database is ready for this mapping already.

    In a ready database this only upgrades tables and functions, and the gate stays open.
    """
    create_tables(connection, mapping)
    run_scripts(connection, prepare_scripts(mapping, ready=is_ready(connection, mapping)))


def is_ready(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether all triggers are enabled, and have been since they first counted by this mapping."""
    if not is_installed(connection):
        return False
    return (
        _has_all_triggers(connection, mapping)
        and _counts_by_mapping(connection, mapping)
        and are_triggers_unchanged(connection)
    )


def prepare_scripts(mapping: HostMapping, *, ready: bool) -> list[str]:
    if ready:
        return [*_function_scripts(mapping), FILL_BASELINE]
    # These functions make existing triggers count by this mapping: every older balance is stale.
    counting = sql_scripts(mapping, BEFORE_TRIGGERS)
    return [DROP_FUNCTIONS, _MARK_STALE, *counting, save_sql(mapping, ready=False), SAVE_BASELINE]


def _function_scripts(mapping: HostMapping) -> list[str]:
    """Return the scripts that create all of trueup's functions; the gate needs them."""
    return [DROP_FUNCTIONS, *sql_scripts(mapping, FUNCTIONS)]


def opening_scripts(mapping: HostMapping, *checks: str) -> list[str]:
    """Return the scripts that create the gate's functions and record that all is ready; `checks` run in between."""
    return [*_function_scripts(mapping), *checks, save_sql(mapping), FILL_BASELINE]


def close_gate(connection: Connection, mapping: HostMapping) -> None:
    """Drop the gate's functions, and mark every balance as stale."""
    run_scripts(connection, prepare_scripts(mapping, ready=False))


def batch_users(connection: Connection, mapping: HostMapping) -> int:
    """Return the number of users in one batch of balances, by the server's estimates."""
    log, subscriptions = (
        estimated_rows(connection, quote_table(table))
        for table in (mapping.usage_log.table, mapping.subscription.table)
    )
    return max(1, min(MAX_BATCH_USERS, BATCH_ROWS * max(subscriptions, 1) // max(log, 1)))


def estimated_rows(connection: Connection, table: str) -> int:
    """Return the server's estimate of a table's rows; `table` is quoted as in SQL. 0: there is no estimate yet."""
    rows: int | None = connection.scalar(_ROWS, {"table": table})
    return rows or 0


def fill(*, batch_users: int = MAX_BATCH_USERS, patience_seconds: float = PATIENCE_SECONDS) -> int:
    """Build the stale balances from the log, `batch_users` users per transaction. Returns how many were built.

    Balances that a transaction has locked, and those of users with grants, are built at their next use.
    """
    last: Any = None
    filled = 0
    while True:
        row = take_step(partial(_fill_batch, after=last, limit=batch_users), patience_seconds=patience_seconds)
        filled += int(row.filled)
        last = row.last
        if last is None:
            return filled


def _fill_batch(connection: Connection, *, after: Any, limit: int) -> Row[Any]:
    return connection.execute(_FILL, {"after": after, "limit": limit}).one()


def open_gate(connection: Connection, mapping: HostMapping) -> None:
    """Create the gate's functions and record that all is ready, if the triggers and a sample of balances are right.

    Raises `AttachError` otherwise; the transaction then changes nothing.
    """
    if not _has_all_triggers(connection, mapping) or uncovered_partitions(connection):
        raise AttachError(
            "A trigger is missing or disabled again. The gate stays closed. Run `trueup db attach` again."
        )
    _refuse_changed_triggers(connection)
    wrong = connection.execute(render_statement(_MISMATCHES, mapping), {"users": SAMPLE_USERS}).scalars().all()
    if wrong:
        raise AttachError(
            f"Balances do not agree with the log, for example those of {', '.join(map(str, wrong[:5]))}. The gate "
            "stays closed. Look for the host's own triggers or rules that change rows as they are logged."
        )
    run_scripts(connection, opening_scripts(mapping))


def _refuse_changed_triggers(connection: Connection) -> None:
    """Raise `AttachError` if triggers were changed: they missed rows, and the balances were not marked stale."""
    if not are_triggers_unchanged(connection):
        raise AttachError(
            "Another session disabled or re-created trueup's triggers meanwhile. The gate stays closed. Run "
            "`trueup db attach` again."
        )


def _has_all_triggers(connection: Connection, mapping: HostMapping) -> bool:
    return has_log_triggers(connection, mapping) and has_subscription_trigger(connection, mapping)


def _lacks_partition_triggers(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether a partition lacks triggers. Until the database is ready for this mapping, each one may."""
    if len(log_tables(connection, mapping)) == 1:
        return False
    return not is_ready(connection, mapping) or bool(uncovered_partitions(connection))


def _lacks_subscription_trigger(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether the trigger is missing, or was replaced or disabled for a while: the journal must begin again."""
    if not has_subscription_trigger(connection, mapping):
        return True
    there = connection.scalar(text("SELECT to_regproc('trueup.journal_since') IS NOT NULL"))
    return bool(there and connection.scalar(text("SELECT trueup.journal_since() IS NULL")))


def has_log_triggers(connection: Connection, mapping: HostMapping) -> bool:
    return _has_triggers(connection, quote_table(mapping.usage_log.table), LOG_TRIGGERS)


def has_subscription_trigger(connection: Connection, mapping: HostMapping) -> bool:
    return _has_triggers(connection, quote_table(mapping.subscription.table), (WINDOW_TRIGGER,))


def _has_triggers(connection: Connection, table: str, triggers: tuple[str, ...]) -> bool:
    """Return whether the table has all these triggers of trueup's, enabled."""
    enabled: int = connection.execute(_ENABLED, {"table": table, "names": list(triggers)}).scalar_one()
    return enabled == len(triggers)


def _counts_by_mapping(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether the trigger functions count by this mapping, be they of this version or of an older one."""
    if connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation")) == mapping.fingerprint():
        return True
    wanted = {pair for pair in expected_functions(mapping) if pair[0].startswith("append_")}
    return wanted == {(row.name, row.body) for row in connection.execute(_TRIGGER_FUNCTIONS)}


_ROWS = text(
    "SELECT CAST(sum(greatest(c.reltuples, 0)) AS bigint) FROM pg_class c WHERE c.oid = to_regclass(:table) "
    "OR c.oid IN (SELECT relid FROM pg_partition_tree(to_regclass(:table)) WHERE isleaf)"
)

_FILL = text("SELECT last, filled FROM trueup.fill_balances(:after, :limit)")

_MARK_STALE = """
INSERT INTO trueup.log_truncation (truncated_at) SELECT clock_timestamp() WHERE EXISTS (SELECT FROM trueup.balance);
"""

_ENABLED = text(
    """
    SELECT count(*) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE g.tgrelid = to_regclass(:table) AND g.tgenabled IN ('O', 'A') AND g.tgname = ANY (CAST(:names AS text[]))
      AND g.tgnargs = 0
      AND p.pronamespace = to_regnamespace('trueup')
    """
)

_TRIGGER_FUNCTIONS = text(
    """
    SELECT CAST(proname AS text) AS name, md5(convert_to(prosrc, 'UTF8')) AS body FROM pg_proc
    WHERE pronamespace = to_regnamespace('trueup') AND prorettype = CAST('trigger' AS regtype)
    """
)

# One statement has one snapshot, so it sees a log row together with its delta.
_MISMATCHES = """
    {% from "host/rows.sql" import used_since %}
    SELECT b.user_id
    FROM (SELECT * FROM trueup.balance WHERE log_epoch = trueup.log_epoch() ORDER BY random() LIMIT :users) b
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(d.tokens), 0) AS tokens FROM trueup.usage_delta d
        WHERE d.user_id = b.user_id AND d.used_at >= b.window_start) d
    CROSS JOIN LATERAL ({{ used_since("b.user_id", "b.window_start") }}) l
    WHERE b.consumed + d.tokens <> l.tokens
"""

_HEAD = """\
-- The steps of `trueup db attach` for this database. Run it in psql, as the role that will own schema trueup.
-- It stops at the first error and is safe to run again. Each step is its own transaction and waits at most
-- {milliseconds} ms for a lock on a host table. If a table is in use, run the script again.
\\set ON_ERROR_STOP on
SET search_path = {search_path};  -- no function or operator of another role is called
SET timezone = {time_zone};  -- for times without a zone
SET row_security = off;  -- fail instead of adding up only the rows that a policy shows
"""

_BEGIN = f"""\
BEGIN;
SET LOCAL lock_timeout = '{LOCK_TIMEOUT_MILLISECONDS}ms';
SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s';
SELECT pg_advisory_xact_lock({INSTALL_LOCK});
"""

_FILL_SCRIPT = """\
SET lock_timeout = '{milliseconds}ms';
SET statement_timeout = 0;
DO $$
DECLARE
    v_last {user_id_type};
BEGIN
    LOOP
        PERFORM pg_advisory_xact_lock({lock});
        SELECT f.last INTO v_last FROM trueup.fill_balances(v_last, {users}) f;
        COMMIT;
        EXIT WHEN v_last IS NULL;
    END LOOP;
END $$;
"""

_COMPARE = """\
DO $$
BEGIN
    IF EXISTS ({mismatches}) THEN
        RAISE EXCEPTION 'balances do not agree with the log: the gate stays closed';
    END IF;
END $$;
"""

_CHECK_TRIGGERS = "SELECT trueup.require_watched();\n"
