"""trueup's own objects in the database: their version, their mapping, triggers and rights."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from sqlalchemy import Connection, text

from trueup.database.layout import revision_of
from trueup.database.migrate import newest_revision
from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.mapping import HostMapping, quote_identifier, quote_table
from trueup.host.partitions import FAMILY, uncovered_partitions
from trueup.install.baseline import LOG_TRIGGERS, WINDOW_TRIGGER, are_triggers_unchanged
from trueup.install.install import expected_functions
from trueup.install.rights import lacking_rights, worker_rights
from trueup.settings.settings import Settings

_ATTACH = "Run `trueup db attach`."
_SHOWN = 3
_trigger_warning, _trigger_error = partial(warning, "triggers"), partial(error, "triggers")


def is_installed(connection: Connection) -> bool:
    """Return whether trueup's tables exist. The role needs no right on the schema."""
    table = text("SELECT 1 FROM pg_tables WHERE schemaname = 'trueup' AND tablename = 'installation'")
    return connection.scalar(table) is not None


def check_schema(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that trueup's tables have the code's version."""
    wanted = newest_revision()
    if not is_installed(connection):
        yield error("schema", "This database has no trueup schema.", _ATTACH, wanted=wanted)
        return
    version = revision_of(connection)
    if version == wanted:
        yield ok("schema", f"Schema trueup has the code's version ({version}).", version=version)
    else:
        what = f"Schema trueup has version {version}, the code has version {wanted}."
        remedy = f"{_ATTACH} If the schema is newer, upgrade trueup on this machine."
        yield error("schema", what, remedy, version=version, wanted=wanted)


def check_functions(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that the functions in the database belong to this code and this mapping."""
    fingerprint = connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation"))
    if fingerprint != settings.host.fingerprint():
        what = "The database was set up for other table or column names than those in [host]."
        remedy = f"Restore the names in [host], or adopt the new ones: {_ATTACH}"
        yield error("functions", what, remedy, fingerprint=fingerprint, wanted=settings.host.fingerprint())
        return
    statement = text(
        "SELECT CAST(proname AS text), md5(convert_to(prosrc, 'UTF8')) FROM pg_proc "
        "WHERE pronamespace = to_regnamespace('trueup')"
    )
    existing = Counter((str(name), str(body)) for name, body in connection.execute(statement))
    wanted = expected_functions(settings.host)
    differing = sorted({name for name, _ in (wanted - existing) + (existing - wanted)})
    if differing:
        what = f"Functions of trueup are missing or have another version: {_some(differing)}."
        yield error("functions", what, f"{_ATTACH} Then restart workers of an older version.", functions=differing)
    else:
        yield ok("functions", f"All {existing.total()} functions belong to this version and mapping.")


def check_triggers(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that triggers count every row written to the log: they exist, are enabled, and no write bypasses them."""
    log = settings.host.usage_log.table
    found = [
        *(list(_disabled_triggers(connection, settings.host)) or _touched_triggers(connection)),
        *_triggers_elsewhere(connection, log),
        *_uncovered_partitions(connection, log),
        *_replica_roles(connection),
        *_subscription(connection, log),
    ]
    wanted = len(LOG_TRIGGERS) + 1
    yield from found or [ok("triggers", f"All {wanted} triggers of log and subscriptions exist and are enabled.")]


_TRIGGER_STATE = text(
    """
    SELECT CAST(g.tgenabled AS text) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE g.tgrelid = to_regclass(:table) AND g.tgname = :name AND NOT g.tgisinternal
      AND p.pronamespace = to_regnamespace('trueup')
      AND g.tgnargs = 0  -- a trigger with arguments belongs to a partition
    """
)
_DISABLED_STATES = {"D": "disabled", "R": "enabled for replication alone"}


def _disabled_triggers(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    for table, names in ((mapping.usage_log.table, LOG_TRIGGERS), (mapping.subscription.table, (WINDOW_TRIGGER,))):
        for name in names:
            state = connection.scalar(_TRIGGER_STATE, {"table": quote_table(table), "name": name})
            if state in ("O", "A"):
                continue
            how = _DISABLED_STATES.get(state or "", "missing")
            effect, remedy = "rows that the host writes are not counted.", f"{_ATTACH} It rebuilds all balances."
            if name == WINDOW_TRIGGER:
                effect = (
                    "trueup may take several renewals for one, and then settle grants wrongly. Changes of counters go "
                    "unseen, so causes of drift are inferred, not proven."
                )
                remedy = _ATTACH
            yield _trigger_error(f"Trigger {name} on {table} is {how}: {effect}", remedy, trigger=name, state=how)


def _touched_triggers(connection: Connection) -> Iterator[Finding]:
    if _may_call(connection, "trigger_marks") and not are_triggers_unchanged(connection):
        yield _trigger_error(
            "Since trueup was set up, triggers were recreated or disabled for a while, or columns that they count were "
            "replaced. Some usage may not be counted, so the gate is closed.",
            f"{_ATTACH} It rebuilds each balance from the log.",
        )


def _triggers_elsewhere(connection: Connection, log: str) -> Iterator[Finding]:
    """Yield tables with trueup's triggers that are neither the log nor one of its partitions."""
    statement = text(
        f"""{FAMILY}
        SELECT DISTINCT CAST(CAST(g.tgrelid AS regclass) AS text) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
        WHERE p.pronamespace = to_regnamespace('trueup') AND NOT g.tgisinternal  AND p.proname <> 'append_window'
          AND g.tgnargs = 0 AND g.tgrelid <> ALL (SELECT f.id FROM family f WHERE f.id IS NOT NULL)
        ORDER BY 1"""
    )
    for other in connection.scalars(statement, {"log": quote_table(log)}):
        what = f"{other} also has trueup's triggers, but is not the mapped log: its rows count as usage."
        remedy = f"If it is the log now, set host.usage_log.table. If it was the log before: {_ATTACH}"
        yield _trigger_warning(what, remedy, table=other)


_MAY_CALL = text(
    "SELECT has_schema_privilege(pronamespace, 'USAGE') AND has_function_privilege(oid, 'EXECUTE') FROM pg_proc "
    "WHERE pronamespace = to_regnamespace('trueup') AND proname = :name"
)


def _may_call(connection: Connection, function: str) -> bool:
    """Return whether the role may call trueup's function. The checks of functions and rights report why not."""
    return bool(connection.scalar(_MAY_CALL, {"name": function}))


def _uncovered_partitions(connection: Connection, log: str) -> Iterator[Finding]:
    """Yield partitions without triggers: the log's own triggers fire only for writes through the log."""
    if _may_call(connection, "log_partitions") and (uncovered := uncovered_partitions(connection)):
        partitions = f"{len(uncovered)} partitions of {log} have no triggers of their own ({_some(uncovered)})"
        what = f"{partitions}: rows written directly to them are not counted."
        remedy = f"{_ATTACH} It adds the triggers, and rebuilds balances if the partitions have rows."
        yield _trigger_warning(what, remedy, partitions=uncovered)


def _replica_roles(connection: Connection) -> Iterator[Finding]:
    """Yield roles and databases whose sessions fire no triggers."""
    statement = text(
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
    for who in connection.scalars(statement):
        what = f"session_replication_role is replica for {who}: no trigger counts the rows that its sessions write."
        yield _trigger_error(what, "Reset it, then run `trueup reconcile --deep`.", who=who)


def _subscription(connection: Connection, log: str) -> Iterator[Finding]:
    """Check that logical replication does not fill the log: it fires no statement-level triggers."""
    replicated = text("SELECT 1 FROM pg_subscription_rel WHERE srrelid = to_regclass(:log)")
    if connection.execute(replicated, {"log": quote_table(log)}).first():
        what = f"Logical replication fills {log}, but it fires no statement-level triggers: no row is counted."
        yield _trigger_error(what, "Run trueup on the database where the application writes the log.")


def check_rights(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that the current role has the rights that workers need, and no more."""
    row = connection.execute(
        text("SELECT CAST(rolname AS text) AS name, rolsuper AS super FROM pg_roles WHERE rolname = current_user")
    ).one()
    lacking = [str(right) for right in lacking_rights(connection, worker_rights(connection, settings.host))]
    if lacking:
        what = f"Role {row.name} lacks {len(lacking)} rights that workers need: {_some(lacking)}."
        remedy = f"Ask the database's owner to run: trueup db grants --worker-role {quote_identifier(row.name)} | psql"
        yield error("rights", what, remedy, role=row.name, lacking=lacking)
    elif row.super and settings.database_url:
        what = f"Role {row.name} is a superuser: a bug in trueup could change any table."
        remedy = "Run workers with the worker role that `trueup db grants` creates."
        yield warning("rights", what, remedy, role=row.name)
    else:
        yield ok("rights", f"Role {row.name} has the rights that workers need.", role=row.name)


def _some(names: Any) -> str:
    """Return the first few names, and the number of the others."""
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
