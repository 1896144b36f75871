"""Checks of the mapping against the database's catalog: missing tables and columns, types, and rights."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.host.fields import FIELDS, ID, ID_TYPES, LOCAL_TIME, NOUNS, TEXT, FieldEntry, Noun, types_of
from trueup.host.mapping import HostMapping, quote_table

COMPUTED_REMEDY = (
    "Map a column that can be written, or {value = …} instead. An expression in usage_log.counts may read a computed "
    "column."
)
VIEWS_REMEDY = (
    'Map the columns under [host], or constants instead, such as username = {value = ""}. If the host has no such '
    "table: user = false."
)


def missing_host_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped tables that the database lacks."""
    return _tables_where(connection, mapping.tables(), "to_regclass(quoted) IS NULL")


def missing_host_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped columns that trueup needs and their tables lack, as TABLE.COLUMN."""
    needs_duration = mapping.payment.table is not None
    return _missing(
        connection,
        mapping,
        lambda field, entry: (
            not entry.spare and (not entry.is_for_views or (field == "duration_days" and needs_duration))
        ),
    )


def missing_view_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped columns that only the account and plan views read and that their tables lack.

    Columns of missing tables are left out.
    """
    gone = missing_host_tables(connection, mapping)
    missing = _missing(connection, mapping, lambda _, entry: entry.is_for_views)
    return [column for column in missing if column.rpartition(".")[0] not in gone]


def _missing(connection: Connection, mapping: HostMapping, is_wanted: Callable[[str, FieldEntry], bool]) -> list[str]:
    wanted = [
        (getattr(mapping, noun).table, column)
        for noun in NOUNS
        for field, column in mapping.columns(noun)
        if is_wanted(field, FIELDS[noun][field])
    ]
    statement = text(
        """
        SELECT name || '.' || wanted
        FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[]), CAST(:columns AS text[]))
            WITH ORDINALITY AS t (name, quoted, wanted, place)
        WHERE NOT EXISTS (SELECT FROM pg_attribute a
                          WHERE a.attrelid = to_regclass(quoted) AND a.attname = wanted AND a.attnum > 0)
        ORDER BY place
        """
    )
    tables, columns = [table for table, _ in wanted], [column for _, column in wanted]
    values = {"names": tables, "quoted": [quote_table(table) for table in tables], "columns": columns}
    return list(connection.scalars(statement, values))


def hidden_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped tables whose rows row-level security hides from the current role."""
    return _tables_where(connection, mapping.tables(), "row_security_active(to_regclass(quoted))")


def column_names(connection: Connection, table: str) -> list[str]:
    """Return the columns of a table in their order; an empty list if there is no such table."""
    statement = text(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped "
        "ORDER BY attnum"
    )
    return list(connection.scalars(statement, {"table": quote_table(table)}))


def demanded_log_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the log's columns without a default that each row must fill and trueup's rows don't fill."""
    must_fill = "attnotnull AND NOT atthasdef AND attidentity = '' AND attname <> ALL (CAST(:written AS text[]))"
    return _log_columns_where(connection, mapping, must_fill)


def computed_log_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the log's columns that the database computes and trueup's rows would fill."""
    return _log_columns_where(connection, mapping, "attgenerated <> '' AND attname = ANY (CAST(:written AS text[]))")


def _log_columns_where(connection: Connection, mapping: HostMapping, condition: str) -> list[str]:
    log = mapping.usage_log
    if log.record == "host":
        return []
    statement = text(
        "SELECT attname FROM pg_attribute "
        f"WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped AND {condition} ORDER BY attnum"
    )
    found = connection.scalars(statement, {"table": quote_table(log.table), "written": log.written})
    return [f"{log.table}.{column}" for column in found]


def host_triggers(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the host's own triggers that may change the counter or the rows of the log, each with its reason.

    Those on the subscriptions, those on the log that run before a row is written, and those of the log or decrements
    whose function names the counter's column.
    """
    names = mapping.subscription
    tables = [mapping.usage_log.table, names.table]
    tables += [mapping.token_usage.table] if mapping.token_usage.table else []
    statement = text(
        """
        SELECT t.name, CAST(g.tgname AS text) AS trigger, p.prosrc ~ ('\\m' || :counter || '\\M') AS names_counter,
               g.tgtype & 3 = 3 AND t.place = 1 AS changes_rows
        FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[])) WITH ORDINALITY AS t (name, quoted, place)
        JOIN pg_trigger g ON g.tgrelid = to_regclass(t.quoted) AND NOT g.tgisinternal AND g.tgenabled IN ('O', 'A')
        JOIN pg_proc p ON p.oid = g.tgfoid AND p.pronamespace <> coalesce(to_regnamespace('trueup')::oid, 0)
        WHERE t.place = 2 OR p.prosrc ~ ('\\m' || :counter || '\\M') OR (g.tgtype & 3 = 3 AND t.place = 1)
        ORDER BY t.place, g.tgname
        """.replace("::", r"\:\:")
    )
    quoted = [quote_table(table) for table in tables]
    rows = connection.execute(
        statement, {"names": tables, "quoted": quoted, "counter": re.escape(names.tokens_remaining)}
    )
    return [
        f"{row.trigger} on {row.name}"
        + (f": its function names {names.tokens_remaining}" if row.names_counter else "")
        + (": it may change rows of the log" if row.changes_rows and not row.names_counter else "")
        for row in rows
    ]


def tables_without_triggers(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the usage log and the subscriptions if they can have no triggers, because they are views."""
    is_view = "EXISTS (SELECT FROM pg_class c WHERE c.oid = to_regclass(quoted) AND c.relkind NOT IN ('r', 'p'))"
    return _tables_where(connection, [mapping.usage_log.table, mapping.subscription.table], is_view)


def _tables_where(connection: Connection, tables: list[str], condition: str) -> list[str]:
    """Return the tables for which the condition is true. In it, `quoted` is the table's name in SQL."""
    statement = text(
        "SELECT name FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[])) "
        f"WITH ORDINALITY AS t (name, quoted, place) WHERE {condition} ORDER BY place"
    )
    return list(connection.scalars(statement, {"names": tables, "quoted": [quote_table(table) for table in tables]}))


@dataclass(frozen=True, kw_only=True)
class Column:
    """A mapped column as the catalog has it."""

    noun: Noun
    field: str
    table: str
    name: str
    type: str

    @property
    def entry(self) -> FieldEntry:
        return FIELDS[self.noun][self.field]

    @property
    def is_user_id(self) -> bool:
        return self.entry.references == "user" or (self.noun, self.field) == ("user", "id")


@dataclass(frozen=True, kw_only=True)
class WrongType:
    """A column whose type does not fit its mapping, and the remedy."""

    column: Column
    what: str
    remedy: str


def wrong_types(columns: Iterable[Column], mapping: HostMapping) -> Iterator[WrongType]:
    """Yield the mapped columns whose types trueup can't count, compare or write."""
    for column in columns:
        wanted = _wanted(mapping, column)
        if wanted and column.type not in wanted:
            what = f"{column.table}.{column.name} is {column.type}, where trueup needs {' or '.join(sorted(wanted))}."
            yield WrongType(column=column, what=what, remedy=_remedy(column))


def local_times(columns: Iterable[Column], mapping: HostMapping) -> Iterator[Column]:
    """Yield the mapped columns with times without a zone, which are read as UTC."""
    return (column for column in columns if column.type == LOCAL_TIME and column.type in _wanted(mapping, column))


def _remedy(column: Column) -> str:
    instead = f"Map another column as host.{column.noun}.{column.field}"
    if column.is_user_id:
        return f"{instead}, or correct host.user_id_type."
    if (column.noun, column.field) == ("usage_log", "metadata"):
        return f"{instead}, or no column: {column.field} = {{value = {{}}}}."
    return f"{instead}, or change this column's type."


def mapped_columns(connection: Connection, mapping: HostMapping) -> list[Column]:
    """Return the columns that the mapping names and the tables have."""
    wanted = [
        (noun, field, getattr(mapping, noun).table, name)
        for noun in NOUNS
        for field, name in mapping.columns(noun)
        # Not the columns of expressions: an expression may use any type.
        if getattr(getattr(mapping, noun), field) == name
    ]
    rows = connection.execute(
        text(
            """
            SELECT w.noun, w.field, w.name AS table, w.column AS name, (
                       WITH RECURSIVE kind (id, base) AS (
                           SELECT t.oid, t.typbasetype
                           UNION ALL
                           SELECT b.oid, b.typbasetype FROM kind k JOIN pg_type b ON b.oid = k.base)
                       SELECT format_type(k.id, NULL) FROM kind k WHERE k.base = 0) AS type
            FROM unnest(CAST(:nouns AS text[]), CAST(:fields AS text[]), CAST(:names AS text[]),
                        CAST(:quoted AS text[]), CAST(:columns AS text[]))
                WITH ORDINALITY AS w (noun, field, name, quoted, "column", place)
            JOIN pg_attribute a ON a.attrelid = to_regclass(w.quoted) AND a.attname = w.column AND a.attnum > 0
            JOIN pg_type t ON t.oid = a.atttypid
            ORDER BY w.place
            """
        ),
        {
            "nouns": [noun for noun, _, _, _ in wanted],
            "fields": [field for _, field, _, _ in wanted],
            "names": [table for _, _, table, _ in wanted],
            "quoted": [quote_table(table) for _, _, table, _ in wanted],
            "columns": [column for _, _, _, column in wanted],
        },
    )
    return [Column(**row) for row in rows.mappings()]


def _wanted(mapping: HostMapping, column: Column) -> tuple[str, ...]:
    """Return the types that a column may have; none if any type will do, as for columns that are only shown."""
    if column.is_user_id:
        return types_of(kind for kind, id_type in ID_TYPES.items() if id_type == mapping.user_id_type)
    entry = column.entry
    return () if entry.kinds in (ID, TEXT) or entry.is_for_views else types_of(entry.kinds)
