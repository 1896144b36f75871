"""Set up trueup beside a host that is running: in small steps, none of which is in the host's way for long.

Tables, then the triggers, then the balances from the log, then, once those agree with the log, the functions that the
gate runs by. Until then every gate refuses. What is done is read from the database itself: interrupted, it goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, text

from trueup.database.locks import PATIENCE_SECONDS, take_step
from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.partitions import log_tables, uncovered_partitions
from trueup.host.sql import render_statement
from trueup.install.install import (
    DROP_FUNCTIONS,
    SQL_FILES,
    create_tables,
    expected_functions,
    run_scripts,
    save_sql,
    sql_scripts,
)
from trueup.install.rights import refuse_without_rights
from trueup.install.triggers import (
    KEEP_WATCHED,
    LOG_TRIGGERS,
    SAVE_TRIGGERS,
    SAVE_WATCHED,
    WINDOW_TRIGGER,
    is_untouched,
)

# As many users at once as have about so many log rows: reading the log from end to end for few would be a waste.
BATCH_ROWS = 10_000_000
MAX_BATCH_USERS = 500_000
SAMPLE_USERS = 1_000

# Whatever the triggers and the filling need; nothing of the gate's is among it.
BEFORE_TRIGGERS = (*SQL_FILES[: SQL_FILES.index("install/triggers.sql")], "install/search_path.sql")
FUNCTIONS = tuple(name for name in SQL_FILES if not name.endswith("triggers.sql"))


class AttachError(TrueupError):
    """What was built does not agree with the host's log, or is not in place. The gate stays closed."""


Tell = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class TriggerStep:
    """A transaction that puts triggers on a table of the host: `attach` takes it, `attach_script` prints it.

    `title`: what the script says. `done`: what `attach` tells afterwards, of {table}. `noun`: whose table it locks.
    `is_needed`: whether triggers are missing there. `scripts`: what makes them. `keeps_balances`: balances from before
    stay, so that the step is refused where somebody else has changed trueup's triggers meanwhile.
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
        """Put the triggers on the table, unless they are at work."""
        if self.is_needed(connection, mapping):
            if self.keeps_balances:
                _refuse_touched(connection)
            run_scripts(connection, self.scripts(mapping))


WATCH_LOG = TriggerStep(
    title="2. The triggers on the log",
    done=None,
    noun="usage_log",
    is_needed=lambda connection, mapping: not is_log_watched(connection, mapping),
    # Each balance from before is stale then.
    scripts=lambda mapping: [_MARK_STALE, *sql_scripts(mapping, ["install/triggers.sql"]), SAVE_WATCHED],
)
WATCH_PARTITIONS = TriggerStep(
    title="2. Those on its partitions",
    done="Triggers on {table} are there.",
    noun="usage_log",
    is_needed=lambda connection, mapping: _lacks_partition_triggers(connection, mapping),
    scripts=lambda mapping: sql_scripts(mapping, ["install/partition_triggers.sql"]),
)
WATCH_SUBSCRIPTIONS = TriggerStep(
    title="2. The trigger on the subscriptions",
    done="The trigger on {table} is there.",
    noun="subscription",
    is_needed=lambda connection, mapping: not are_subscriptions_watched(connection, mapping),
    scripts=lambda mapping: [*sql_scripts(mapping, ["install/window_triggers.sql"]), SAVE_TRIGGERS],
    keeps_balances=True,
)
TRIGGER_STEPS = (WATCH_LOG, WATCH_PARTITIONS, WATCH_SUBSCRIPTIONS)


def attach(
    mapping: HostMapping, *, tell: Tell = lambda _: None, patience_seconds: float = PATIENCE_SECONDS
) -> dict[str, int]:
    """Make the database ready for this mapping; return how many balances were built. Safe to repeat and to interrupt.

    `tell` is given a line after each step. Raises `MissingRightError`, `NotInstalledError` for a host that does not
    fit, `HostBusyError`, and `AttachError` when what was built does not hold; then the gate stays closed.
    """
    retrying(lambda connection: refuse_without_rights(connection, mapping))

    def take(step: Callable[[Connection, HostMapping], None], tables: list[str], done: str | None) -> None:
        take_step(lambda connection: step(connection, mapping), tables, patience_seconds=patience_seconds)
        if done is not None:
            tell(done)

    ready = retrying(lambda connection: is_ready(connection, mapping))
    take(prepare, [], "Tables are there.")
    for step in TRIGGER_STEPS:
        table = step.table(mapping)
        take(step.take, [quote_table(table)], step.done and step.done.format(table=table))

    def build() -> int:
        users = retrying(lambda connection: batch_users(connection, mapping))
        filled = fill(batch_users=users, patience_seconds=patience_seconds)
        tell(f"Balances are built: {filled}.")
        take(open_gate, [], "Balances agree with the log: ready.")
        return filled

    try:
        return {"balances": build()}
    except AttachError:
        if not ready:
            raise
    # It was open all along. What it counted may lack rows that came unseen, or have some that went with a partition.
    take(close_gate, [], "What was built does not hold: the gate is closed, and all balances are built anew.")
    return {"balances": build()}


def prepare(connection: Connection, mapping: HostMapping) -> None:
    """Make the tables; and close the gate, unless all that the host has written was counted for this mapping.

    Then tables and functions are of this version at once, and the gate goes on.
    """
    create_tables(connection, mapping)
    run_scripts(connection, prepare_scripts(mapping, ready=is_ready(connection, mapping)))


def is_ready(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether the triggers are at work, and have been since they counted by this mapping."""
    if connection.scalar(text("SELECT to_regclass('trueup.installation') IS NULL")):
        return False
    return _all_watched(connection, mapping) and _is_counted(connection, mapping) and is_untouched(connection)


def prepare_scripts(mapping: HostMapping, *, ready: bool) -> list[str]:
    if ready:
        return [*function_scripts(mapping), KEEP_WATCHED]
    # With these, triggers that are there count by this mapping: what was counted before is stale.
    counting = sql_scripts(mapping, BEFORE_TRIGGERS)
    return [DROP_FUNCTIONS, _MARK_STALE, *counting, save_sql(mapping, ready=False), SAVE_WATCHED]


def function_scripts(mapping: HostMapping) -> list[str]:
    """Return what makes all of trueup's functions: the gate runs by them."""
    return [DROP_FUNCTIONS, *sql_scripts(mapping, FUNCTIONS)]


def opening_scripts(mapping: HostMapping, *checks: str) -> list[str]:
    """Return what makes the gate's functions and records that all is ready; `checks` run in between."""
    return [*function_scripts(mapping), *checks, save_sql(mapping), KEEP_WATCHED]


def close_gate(connection: Connection, mapping: HostMapping) -> None:
    """Take the gate's functions away, and let no balance from before count."""
    run_scripts(connection, prepare_scripts(mapping, ready=False))


def batch_users(connection: Connection, mapping: HostMapping) -> int:
    """Return of how many users the balances are to be built at once, by the server's estimates."""
    log, subscriptions = (
        estimated_rows(connection, quote_table(table))
        for table in (mapping.usage_log.table, mapping.subscription.table)
    )
    return max(1, min(MAX_BATCH_USERS, BATCH_ROWS * max(subscriptions, 1) // max(log, 1)))


def estimated_rows(connection: Connection, table: str) -> int:
    """Return how many rows the server takes a table, named as in SQL, to have; 0: it has never looked."""
    rows: int | None = connection.scalar(_ROWS, {"table": table})
    return rows or 0


def fill(*, batch_users: int = MAX_BATCH_USERS, patience_seconds: float = PATIENCE_SECONDS) -> int:
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
    if not _all_watched(connection, mapping) or uncovered_partitions(connection):
        raise AttachError(
            "A trigger is missing or disabled again. The gate stays closed. Run `trueup db attach` again."
        )
    _refuse_touched(connection)
    wrong = connection.execute(render_statement(MISMATCHES, mapping), {"users": SAMPLE_USERS}).scalars().all()
    if wrong:
        raise AttachError(
            f"Balances do not agree with the log, those of {', '.join(map(str, wrong[:5]))} among them. The gate stays "
            "closed. Look for triggers or rules of the host's own that change rows as they are logged."
        )
    run_scripts(connection, opening_scripts(mapping))


def _refuse_touched(connection: Connection) -> None:
    """What was written while they were off was not counted, and nobody marked the balances stale for it."""
    if not is_untouched(connection):
        raise AttachError(
            "Triggers of trueup were switched off, or made anew, by somebody else meanwhile. The gate stays closed. "
            "Run `trueup db attach` again."
        )


def _fill_batch(values: dict[str, Any]) -> Callable[[Connection], Row[Any]]:
    return lambda connection: connection.execute(_FILL, values).one()


def _all_watched(connection: Connection, mapping: HostMapping) -> bool:
    return is_log_watched(connection, mapping) and are_subscriptions_watched(connection, mapping)


def _lacks_partition_triggers(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether a partition lacks them. Before all was ready once for this mapping each may."""
    if len(log_tables(connection, mapping)) == 1:
        return False
    return not is_ready(connection, mapping) or bool(uncovered_partitions(connection))


def is_log_watched(connection: Connection, mapping: HostMapping) -> bool:
    return _is_watched(connection, quote_table(mapping.usage_log.table), LOG_TRIGGERS)


def are_subscriptions_watched(connection: Connection, mapping: HostMapping) -> bool:
    return _is_watched(connection, quote_table(mapping.subscription.table), (WINDOW_TRIGGER,))


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


_ROWS = text(
    "SELECT CAST(sum(greatest(c.reltuples, 0)) AS bigint) FROM pg_class c WHERE c.oid = to_regclass(:table) "
    "OR c.oid IN (SELECT relid FROM pg_partition_tree(to_regclass(:table)) WHERE isleaf)"
)

_FILL = text("SELECT last, filled FROM trueup.fill_balances(:after, :limit)")

_MARK_STALE = """
INSERT INTO trueup.log_truncation (truncated_at) SELECT clock_timestamp() WHERE EXISTS (SELECT FROM trueup.balance);
"""

_AT_WORK = text(
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

# One statement, one snapshot: a log row and its delta are seen together.
MISMATCHES = """
    {% from "host/rows.sql" import used_since %}
    SELECT b.user_id
    FROM (SELECT * FROM trueup.balance WHERE log_epoch = trueup.log_epoch() ORDER BY random() LIMIT :users) b
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(d.tokens), 0) AS tokens FROM trueup.usage_delta d
        WHERE d.user_id = b.user_id AND d.used_at >= b.window_start) d
    CROSS JOIN LATERAL ({{ used_since("b.user_id", "b.window_start") }}) l
    WHERE b.consumed + d.tokens <> l.tokens
"""
