"""What `trueup db attach` is going to do, what it locks and for how long, and which rights it takes. Only looks."""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.database.engine import transaction
from trueup.database.schema import SCHEMA
from trueup.errors import NotInstalledError, ServiceUnavailableError, TrueupError
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.partitions import log_tables
from trueup.host.sql import render_statement
from trueup.install.attach import are_subscriptions_watched, estimated_rows, is_log_watched
from trueup.install.rights import Right, find_lacking, lacking_rights, migrate_rights, worker_rights

# So many rows of the log are read to see how fast that goes; no longer than this.
SAMPLE_ROWS = 20_000
SAMPLE_MILLISECONDS = 2_000
# Adding up costs more than reading: rows are joined with the subscriptions and grouped. And each balance is written.
FILL_FACTOR = 3.0
WRITTEN_PER_SECOND = 40_000


class OtherInstallationError(TrueupError):
    """Another host's tables are counted in this database. Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class AttachPlan:
    """What there is to do. Rows as the server estimates them.

    `log_tables`: the log and its partitions. `fill_seconds`: about how long balances are built; None: the sample was
    too slow to tell. `needed`: rights that setting up takes. `lacking`: those of them that the role has not, each with
    the statement that gives it. `lacking_to_work`: what this role lacks if the workers are to run as the same.
    """

    log: str
    subscriptions: str
    tables_there: bool
    log_tables: tuple[str, ...]
    log_watched: bool
    subscriptions_watched: bool
    log_rows: int
    subscription_rows: int
    fill_seconds: float | None
    needed: tuple[str, ...]
    lacking: tuple[tuple[str, str], ...]
    lacking_to_work: tuple[str, ...]


def plan_attach(connection: Connection, mapping: HostMapping) -> AttachPlan:
    """Return what there is to do. Raises `NotInstalledError` when a mapped table is not there."""
    log, subscriptions = quote_table(mapping.usage_log.table), quote_table(mapping.subscription.table)
    for table in (log, subscriptions):
        if connection.scalar(text("SELECT to_regclass(:table) IS NULL"), {"table": table}):
            raise NotInstalledError(f"The database has no table {table}. Map the host's names in trueup.toml.")
    rows = {table: estimated_rows(connection, table) for table in (log, subscriptions)}
    of_host = [right for right in worker_rights(connection, mapping) if not _is_own(right)]
    return AttachPlan(
        log=mapping.usage_log.table,
        subscriptions=mapping.subscription.table,
        tables_there=bool(connection.scalar(text("SELECT to_regclass('trueup.installation') IS NOT NULL"))),
        log_tables=tuple(log_tables(connection, mapping)),
        log_watched=is_log_watched(connection, mapping),
        subscriptions_watched=are_subscriptions_watched(connection, mapping),
        log_rows=rows[log],
        subscription_rows=rows[subscriptions],
        fill_seconds=_fill_seconds(mapping, rows[log], rows[subscriptions]),
        needed=("CREATE ON DATABASE, or to own SCHEMA trueup", *map(str, migrate_rights(connection, mapping))),
        lacking=tuple(find_lacking(connection, mapping)),
        lacking_to_work=tuple(map(str, lacking_rights(connection, of_host))),
    )


def refuse_other_installation(connection: Connection, mapping: HostMapping) -> None:
    """Raise `OtherInstallationError` if trueup counts other tables here, that are still there, than this mapping's."""
    if connection.scalar(text("SELECT to_regclass('trueup.installation') IS NULL")):
        return
    installed = connection.scalar(text("SELECT mapping FROM trueup.installation"))
    for noun in ("usage_log", "subscription"):
        old, new = (installed or {}).get(noun, {}).get("table"), getattr(mapping, noun).table
        if old is None:
            continue
        values = {"old": quote_table(old), "new": quote_table(new)}
        if connection.scalar(_COUNTED_ELSEWHERE, values):
            raise OtherInstallationError(
                f"trueup is attached to {old} in this database, and counts it; the settings say {new}. Nothing was "
                "changed: a database has one trueup. Give the other application a database of its own. If it is this "
                "one, and its table is another now, give --replace: what was counted in the old one counts no more."
            )


def _is_own(right: Right) -> bool:
    return right.name == SCHEMA or right.name.startswith(f"{SCHEMA}.")


def _fill_seconds(mapping: HostMapping, log_rows: int, subscription_rows: int) -> float | None:
    """Estimate from how fast a few rows are read. Nothing is written."""
    try:
        with transaction() as connection:
            connection.execute(text(f"SET LOCAL statement_timeout = {SAMPLE_MILLISECONDS}"))
            row = connection.execute(render_statement(_SAMPLE, mapping), {"rows": SAMPLE_ROWS}).one()
    except (ServiceUnavailableError, NotInstalledError):
        return None
    reading = float(row.seconds) * log_rows / row.rows if row.rows else 0.0
    return reading * FILL_FACTOR + subscription_rows / WRITTEN_PER_SECOND


# The times of one statement and the next are those of its beginning and its end.
_SAMPLE = """
    WITH began AS MATERIALIZED (SELECT clock_timestamp() AS at),
    sampled AS MATERIALIZED (
        SELECT count(t.tokens) AS rows, count(DISTINCT t.user_id) AS users
        FROM (SELECT l.{{ usage_log.user_id }} AS user_id, l.{{ usage_log.total_tokens }} AS tokens
              FROM began, {{ usage_log }} l LIMIT :rows) t
    )
    SELECT s.rows, extract(epoch FROM clock_timestamp() - b.at) AS seconds FROM began b, sampled s
"""

_COUNTED_ELSEWHERE = text(
    """
    SELECT EXISTS (
        SELECT FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
        WHERE g.tgrelid = to_regclass(:old) AND g.tgrelid IS DISTINCT FROM CAST(to_regclass(:new) AS oid)
          AND g.tgenabled IN ('O', 'A') AND g.tgnargs = 0 AND p.pronamespace = to_regnamespace('trueup'))
    """
)
