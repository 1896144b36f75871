"""The host's tables and columns as its catalog has them, against the mapping."""

from collections.abc import Iterable

from sqlalchemy import Connection, text

from trueup.host.fields import FIELDS, NOUNS
from trueup.host.mapping import HostMapping, quote_table

COMPUTED_REMEDY = (
    "Map a column that can be written, or {value = …} in its place; whether a row counts, "
    "usage_log.counts = {expression = …} may read from such a column."
)
VIEWS_REMEDY = (
    'Map the columns under [host], or what to show in their place: username = {value = ""}. Without such a table: '
    "user = false."
)


def missing_host_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped tables that the database does not have."""
    return _tables_where(connection, mapping.tables(), "to_regclass(quoted) IS NULL")


def missing_host_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped columns, of those that trueup works by, that their tables do not have, as TABLE.COLUMN."""
    return _missing(
        connection,
        (
            (getattr(mapping, noun).table, column)
            for noun in NOUNS
            for field, column in mapping.columns(noun)
            for entry in [FIELDS[noun][field]]
            if not entry.spare
            and (not entry.is_for_views or (field == "duration_days" and mapping.payment.table is not None))
        ),
    )


def missing_view_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped columns that only the account and plan views read, that their tables do not have.

    A table that is not there at all is not looked at.
    """
    gone = set(missing_host_tables(connection, mapping))
    return _missing(
        connection,
        (
            (getattr(mapping, noun).table, column)
            for noun in NOUNS
            for field, column in mapping.columns(noun)
            if FIELDS[noun][field].is_for_views and getattr(mapping, noun).table not in gone
        ),
    )


def _missing(connection: Connection, columns: Iterable[tuple[str, str]]) -> list[str]:
    wanted = list(columns)
    found = connection.execute(
        text(
            """
            SELECT name || '.' || wanted
            FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[]), CAST(:columns AS text[]))
                WITH ORDINALITY AS t (name, quoted, wanted, place)
            WHERE NOT EXISTS (SELECT FROM pg_attribute a
                              WHERE a.attrelid = to_regclass(quoted) AND a.attname = wanted AND a.attnum > 0)
            ORDER BY place
            """
        ),
        {
            "names": [table for table, _ in wanted],
            "quoted": [quote_table(table) for table, _ in wanted],
            "columns": [column for _, column in wanted],
        },
    )
    return list(found.scalars())


def hidden_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped tables of which row-level security would hide rows from the current role."""
    return _tables_where(connection, mapping.tables(), "row_security_active(to_regclass(quoted))")


def column_names(connection: Connection, table: str) -> list[str]:
    """Return the columns that a table has, in their order; none if it is not there."""
    statement = text(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped "
        "ORDER BY attnum"
    )
    return list(connection.scalars(statement, {"table": quote_table(table)}))


def demanded_log_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the log's columns that each row must fill and that trueup, knowing nothing of them, could not."""
    log = mapping.usage_log
    found = connection.execute(
        text(
            """
            SELECT attname FROM pg_attribute
            WHERE attrelid = to_regclass(:quoted) AND attnum > 0 AND NOT attisdropped
              AND attnotnull AND NOT atthasdef AND attidentity = '' AND attname <> ALL (CAST(:known AS text[]))
            ORDER BY attnum
            """
        ),
        {"quoted": quote_table(log.table), "known": log.written},
    )
    return [f"{log.table}.{column}" for column in found.scalars()]


def computed_log_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the columns that trueup's rows in the log would fill, and that the database computes itself."""
    log = mapping.usage_log
    found = connection.execute(
        text(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:quoted) AND attgenerated <> '' "
            "AND NOT attisdropped AND attname = ANY (CAST(:written AS text[])) ORDER BY attnum"
        ),
        {"quoted": quote_table(log.table), "written": log.written},
    )
    return [f"{log.table}.{column}" for column in found.scalars()]


def tables_without_triggers(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return what of the usage log and the subscriptions is no table of this database, such as a view."""
    is_none = "EXISTS (SELECT FROM pg_class c WHERE c.oid = to_regclass(quoted) AND c.relkind NOT IN ('r', 'p'))"
    return _tables_where(connection, [mapping.usage_log.table, mapping.subscription.table], is_none)


def _tables_where(connection: Connection, tables: list[str], condition: str) -> list[str]:
    """Return those of the tables for which the condition is true: of `quoted`, the table as SQL names it."""
    found = connection.execute(
        text(
            "SELECT name FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[])) "
            f"WITH ORDINALITY AS t (name, quoted, place) WHERE {condition} ORDER BY place"
        ),
        {"names": tables, "quoted": [quote_table(table) for table in tables]},
    )
    return list(found.scalars())
