"""The usage log's partitions at any depth, and tables that inherit from it. Their rows are part of the log."""

from sqlalchemy import Connection, text

from trueup.host.mapping import HostMapping, quote_table

# The oids of the log and of these tables, as `family`.
FAMILY = """
    WITH RECURSIVE family (id) AS (
        SELECT CAST(to_regclass(:log) AS oid)
        UNION
        SELECT i.inhrelid FROM pg_inherits i JOIN family f ON i.inhparent = f.id
    )
"""

_TABLES = text(
    f"""
    {FAMILY}
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, c.relkind = 'f' AS is_foreign
    FROM family f JOIN pg_class c ON c.oid = f.id JOIN pg_namespace n ON n.oid = c.relnamespace
    ORDER BY c.oid <> to_regclass(:log), 1
    """
)


_ABOVE = text(
    "SELECT CAST(CAST(inhparent AS regclass) AS text) FROM pg_inherits WHERE inhrelid = to_regclass(:log) LIMIT 1"
)


def log_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the SQL names of the log and its partitions, the log first; empty if there is no such table."""
    return [row.name for row in connection.execute(_TABLES, {"log": quote_table(mapping.usage_log.table)})]


def partition_problem(connection: Connection, mapping: HostMapping) -> tuple[str, str] | None:
    """Return why triggers can't record all writes to the log, and the remedy; None: they can."""
    log = mapping.usage_log.table
    rows = connection.execute(_TABLES, {"log": quote_table(log)}).all()
    foreign = [row.name for row in rows if row.is_foreign]
    if foreign:
        why = f"{', '.join(foreign)} is a foreign table and a partition of {log}, so no trigger can record its rows."
        return why, "Detach it, or make it a table of this database."
    above = connection.scalar(_ABOVE, {"log": quote_table(log)})
    if above is not None:
        return f"{log} is a partition of {above}: rows written to {above} are not recorded.", f"Map {above} as the log."
    return None


def uncovered_partitions(connection: Connection) -> list[str]:
    """Return the SQL names of the partitions without trueup's triggers."""
    statement = "SELECT CAST(CAST(id AS regclass) AS text) FROM trueup.log_partitions() WHERE NOT covered ORDER BY 1"
    return list(connection.scalars(text(statement)))
