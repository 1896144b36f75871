"""The plan of `trueup db attach`: its steps, locks, duration and rights. Read-only."""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.database.engine import transaction
from trueup.database.schema import SCHEMA
from trueup.errors import NotInstalledError, ServiceUnavailableError, TrueupError
from trueup.host.catalog import host_triggers
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.partitions import log_tables
from trueup.host.questions import open_questions
from trueup.host.sql import render_statement
from trueup.install.attach import estimated_rows, has_log_triggers, has_subscription_trigger
from trueup.install.baseline import is_installed
from trueup.install.rights import Right, find_lacking, lacking_rights, migrate_rights, worker_rights

# The sample of the log that measures the reading speed, and its time limit.
SAMPLE_ROWS = 20_000
SAMPLE_MILLISECONDS = 2_000
# Building balances costs more than reading: it joins rows with subscriptions, groups them and writes balances.
FILL_FACTOR = 3.0
WRITTEN_PER_SECOND = 40_000


class OtherInstallationError(TrueupError):
    """trueup is attached to another host's tables in this database. Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class AttachPlan:
    """What `attach` will do. Row counts are the server's estimates.

    `log_tables`: the log and its partitions. `fill_seconds`: estimated seconds to build the balances; None: the sample
    hit its time limit. `needed`: the rights for attaching. `lacking`: rights that the current role lacks, each with its
    GRANT statement. `lacking_to_work`: the rights that it lacks to run workers on the host's tables.
    `host_triggers`: the host's own triggers that may change the counter or the log. `questions`: what the host's rows
    leave open and the mapping does not answer.
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
    host_triggers: tuple[str, ...]
    questions: tuple[str, ...]


def plan_attach(connection: Connection, mapping: HostMapping) -> AttachPlan:
    """Return what `attach` will do. Raises `NotInstalledError` if the log or the subscriptions do not exist."""
    log, subscriptions = quote_table(mapping.usage_log.table), quote_table(mapping.subscription.table)
    for table in (log, subscriptions):
        if connection.scalar(text("SELECT to_regclass(:table) IS NULL"), {"table": table}):
            raise NotInstalledError(f"The database has no table {table}. Map the host's names in trueup.toml.")
    rows = {table: estimated_rows(connection, table) for table in (log, subscriptions)}
    of_host = [right for right in worker_rights(connection, mapping) if not _is_own(right)]
    return AttachPlan(
        log=mapping.usage_log.table,
        subscriptions=mapping.subscription.table,
        tables_there=is_installed(connection),
        log_tables=tuple(log_tables(connection, mapping)),
        log_watched=has_log_triggers(connection, mapping),
        subscriptions_watched=has_subscription_trigger(connection, mapping),
        log_rows=rows[log],
        subscription_rows=rows[subscriptions],
        fill_seconds=_fill_seconds(mapping, rows[log], rows[subscriptions]),
        needed=("CREATE ON DATABASE, or to own SCHEMA trueup", *map(str, migrate_rights(connection, mapping))),
        lacking=tuple(find_lacking(connection, mapping)),
        lacking_to_work=tuple(map(str, lacking_rights(connection, of_host))),
        host_triggers=tuple(host_triggers(connection, mapping)),
        questions=tuple(f"{one.what}: {one.remedy}" for one in open_questions(connection, mapping)),
    )


def refuse_other_installation(connection: Connection, mapping: HostMapping) -> None:
    """Raise `OtherInstallationError` if trueup is attached to other tables here that still exist."""
    if not is_installed(connection):
        return
    installed = connection.scalar(text("SELECT mapping FROM trueup.installation"))
    for noun in ("usage_log", "subscription"):
        old, new = (installed or {}).get(noun, {}).get("table"), getattr(mapping, noun).table
        if old is None:
            continue
        values = {"old": quote_table(old), "new": quote_table(new)}
        if connection.scalar(_COUNTED_ELSEWHERE, values):
            raise OtherInstallationError(
                f"trueup is attached to {old} in this database, and the settings say {new}. A database has one trueup, "
                "so nothing was changed. Give each application its own database. If this application now uses the new "
                f"table, give --replace: trueup then stops counting {old}."
            )


def _is_own(right: Right) -> bool:
    return right.name == SCHEMA or right.name.startswith(f"{SCHEMA}.")


def _fill_seconds(mapping: HostMapping, log_rows: int, subscription_rows: int) -> float | None:
    """Estimate the seconds from the time that a sample takes to read. None: the sample hit its time limit."""
    try:
        with transaction() as connection:
            connection.execute(text(f"SET LOCAL statement_timeout = {SAMPLE_MILLISECONDS}"))
            row = connection.execute(render_statement(_SAMPLE, mapping), {"rows": SAMPLE_ROWS}).one()
    except (ServiceUnavailableError, NotInstalledError):
        return None
    reading = float(row.seconds) * log_rows / row.rows if row.rows else 0.0
    return reading * FILL_FACTOR + subscription_rows / WRITTEN_PER_SECOND


# clock_timestamp() runs once before the sample is read and once after it.
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
