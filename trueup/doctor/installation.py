"""trueup's own objects in the database: of this version, for this mapping, and at work."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, text

from trueup.database.layout import revision_of
from trueup.database.migrate import newest_revision
from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.mapping import quote_identifier, quote_table
from trueup.host.partitions import FAMILY, uncovered_partitions
from trueup.install.baseline import LOG_TRIGGERS, WINDOW_TRIGGER, are_triggers_unchanged
from trueup.install.install import expected_functions
from trueup.install.roles import lacking_rights, worker_rights
from trueup.settings.settings import Settings

_INIT = "Run `trueup db attach`."
_SHOWN = 3


def is_installed(connection: Connection) -> bool:
    """Return whether trueup's tables are there, also where the role has no right to look into their schema."""
    return bool(
        connection.scalar(
            text("SELECT EXISTS (SELECT FROM pg_tables WHERE schemaname = 'trueup' AND tablename = 'installation')")
        )
    )


def check_schema(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether trueup's tables are of the code's version."""
    wanted = newest_revision()
    if not is_installed(connection):
        yield error("schema", "This database has no trueup schema.", _INIT, wanted=wanted)
        return
    there = revision_of(connection)
    if there == wanted:
        yield ok("schema", f"Schema trueup is of this version ({there}).", version=there)
    else:
        yield error(
            "schema",
            f"Schema trueup is of version {there}, the code is of version {wanted}.",
            f"{_INIT} If the schema is newer, upgrade trueup on this machine.",
            version=there,
            wanted=wanted,
        )


def check_functions(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether the functions in the database are those of this code and this mapping."""
    fingerprint = connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation"))
    if fingerprint != settings.host.fingerprint():
        yield error(
            "functions",
            "The database was set up for other table or column names than [host] now says.",
            f"Set them back, or: {_INIT}",
            fingerprint=fingerprint,
            wanted=settings.host.fingerprint(),
        )
        return
    rows = connection.execute(
        text(
            "SELECT CAST(proname AS text), md5(convert_to(prosrc, 'UTF8')) FROM pg_proc "
            "WHERE pronamespace = to_regnamespace('trueup')"
        )
    )
    there, wanted = Counter((str(name), str(body)) for name, body in rows), expected_functions(settings.host)
    differing = sorted({name for name, _ in (wanted - there) + (there - wanted)})
    if differing:
        yield error(
            "functions",
            f"Functions of trueup are missing or of another version: {_some(differing)}.",
            f"{_INIT} Workers of an older version then should be restarted.",
            functions=differing,
        )
    else:
        yield ok("functions", f"All {there.total()} functions are those of this version and mapping.")


def check_triggers(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether each row written to the log is counted: triggers there, enabled, and not passed by."""
    idle = [
        *_disabled_triggers(connection, settings.host.usage_log.table),
        *_disabled_window_trigger(connection, settings.host.subscription.table),
    ]
    found = [
        *(idle or _touched_triggers(connection)),
        *_triggers_elsewhere(connection, settings.host.usage_log.table),
        *_uncovered_partitions(connection, settings.host.usage_log.table),
        *_replica_roles(connection),
        *_subscription(connection, settings.host.usage_log.table),
    ]
    wanted = len(LOG_TRIGGERS) + 1
    yield from found or [ok("triggers", f"All {wanted} triggers of log and subscriptions are there and enabled.")]


_TRIGGERS = """
    SELECT CAST(g.tgname AS text) AS name, CAST(g.tgenabled AS text) AS state, CAST(CAST(g.tgrelid AS regclass) AS text)
           AS log
    FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE p.pronamespace = to_regnamespace('trueup') AND NOT g.tgisinternal AND p.proname <> 'append_window'
      AND g.tgnargs = 0  -- else it is a partition's, which counts only what belongs to the log
"""
_HOW_OFF = {"D": "disabled", "R": "enabled for replication alone"}


def _disabled_triggers(connection: Connection, log: str) -> Iterator[Finding]:
    rows = connection.execute(text(f"{_TRIGGERS} AND g.tgrelid = to_regclass(:log)"), {"log": quote_table(log)})
    states = {row.name: row.state for row in rows}
    for trigger in LOG_TRIGGERS:
        state = states.get(trigger)
        if state in ("O", "A"):
            continue
        how = _HOW_OFF.get(state or "", "missing")
        yield error(
            "triggers",
            f"Trigger {trigger} on {log} is {how}: what the host writes is not counted.",
            f"{_INIT} It sets the trigger to work, and lets each balance be built anew from the log.",
            trigger=trigger,
            state=how,
        )


def _disabled_window_trigger(connection: Connection, subscription: str) -> Iterator[Finding]:
    state = connection.scalar(
        text(
            "SELECT CAST(tgenabled AS text) FROM pg_trigger "
            "WHERE tgrelid = to_regclass(:subscription) AND tgname = :name AND NOT tgisinternal"
        ),
        {"subscription": quote_table(subscription), "name": WINDOW_TRIGGER},
    )
    if state not in ("O", "A"):
        how = _HOW_OFF.get(state or "", "missing")
        yield error(
            "triggers",
            f"Trigger {WINDOW_TRIGGER} on {subscription} is {how}: several renewals between two looks of trueup are "
            "taken for one, which may settle grants wrongly.",
            _INIT,
            trigger=WINDOW_TRIGGER,
            state=how,
        )


def _touched_triggers(connection: Connection) -> Iterator[Finding]:
    if _may_call(connection, "trigger_marks") and not are_triggers_unchanged(connection):
        yield error(
            "triggers",
            "Since trueup was set up, triggers were made anew or switched off for a while, or columns that they count "
            "were replaced: not all may be counted, and the gate is closed.",
            "Run `trueup db attach`. It builds each balance anew from the log.",
        )


def _triggers_elsewhere(connection: Connection, log: str) -> Iterator[Finding]:
    """Yield tables that carry our triggers and are neither the log nor one of its partitions."""
    others = connection.scalars(
        text(
            f"{FAMILY} SELECT DISTINCT t.log FROM ({_TRIGGERS} AND g.tgrelid <> ALL ("
            "SELECT f.id FROM family f WHERE f.id IS NOT NULL)) t ORDER BY 1"
        ),
        {"log": quote_table(log)},
    )
    for other in others:
        yield warning(
            "triggers",
            f"trueup's triggers are on {other} too, which is not the mapped log: its rows count as usage.",
            f"If it was the log once: {_INIT} If it is the log now, set host.usage_log.table.",
            table=other,
        )


_MAY_CALL = text(
    "SELECT has_schema_privilege(pronamespace, 'USAGE') AND has_function_privilege(oid, 'EXECUTE') FROM pg_proc "
    "WHERE pronamespace = to_regnamespace('trueup') AND proname = :name"
)


def _may_call(connection: Connection, function: str) -> bool:
    """Return whether trueup's function is there and may be called; the checks of functions and rights say why not."""
    return bool(connection.scalar(_MAY_CALL, {"name": function}))


def _uncovered_partitions(connection: Connection, log: str) -> Iterator[Finding]:
    """Yield partitions into which rows can be written past the triggers: the log's fire for writes through it only."""
    if not _may_call(connection, "log_partitions"):
        return
    uncovered = uncovered_partitions(connection)
    if uncovered:
        yield warning(
            "triggers",
            f"{len(uncovered)} partitions of {log} have no triggers of their own ({_some(uncovered)}): rows written "
            "directly into them are not counted.",
            "Run `trueup db attach`. It adds the triggers, and has balances built anew where there are rows.",
            partitions=uncovered,
        )


def _replica_roles(connection: Connection) -> Iterator[Finding]:
    """Yield roles and databases whose sessions fire no trigger."""
    rows = connection.execute(
        text(
            """
            SELECT coalesce('role ' || r.rolname, 'all roles') AS who
            FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) AS c (setting)
            WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
              AND c.setting ~ '^session_replication_role=(replica)$'
            UNION ALL
            SELECT 'this server' WHERE current_setting('session_replication_role') = 'replica'
            ORDER BY 1
            """
        )
    )
    for row in rows:
        yield error(
            "triggers",
            f"session_replication_role is replica for {row.who}: no trigger counts what its sessions write.",
            "Reset it, then run `trueup reconcile --deep`.",
            who=row.who,
        )


def _subscription(connection: Connection, log: str) -> Iterator[Finding]:
    """Yield that the log's rows come by logical replication, whose worker fires no statement's trigger."""
    replicated = connection.scalar(
        text("SELECT count(*) FROM pg_subscription_rel s WHERE s.srrelid = to_regclass(:log)"),
        {"log": quote_table(log)},
    )
    if replicated:
        yield error(
            "triggers",
            f"{log} is filled by logical replication, which fires no trigger of a statement.",
            "Run trueup on the database that the log is written in.",
        )


def check_rights(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield what the current role may not do though workers must."""
    row = connection.execute(
        text("SELECT CAST(rolname AS text) AS name, rolsuper AS super FROM pg_roles WHERE rolname = current_user")
    ).one()
    lacking = [str(right) for right in lacking_rights(connection, worker_rights(connection, settings.host))]
    if lacking:
        yield error(
            "rights",
            f"Role {row.name} lacks {len(lacking)} rights that workers need: {_some(lacking)}.",
            f"Let the database's owner run: trueup db grants --worker-role {quote_identifier(row.name)} | psql",
            role=row.name,
            lacking=lacking,
        )
    elif row.super and settings.database_url:
        yield warning(
            "rights",
            f"Role {row.name} is a superuser: a mistake of ours could reach anything.",
            "Run workers as the worker role that `trueup db grants` makes.",
            role=row.name,
        )
    else:
        yield ok("rights", f"Role {row.name} has the rights that workers need.", role=row.name)


def _some(names: Any) -> str:
    """Return the first few, and how many more there are."""
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
