"""What types the host's columns have, and which trueup can count and write by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.host.fields import FIELDS, ID, ID_TYPES, LOCAL_TIME, NOUNS, TEXT, FieldEntry, Noun, types_of
from trueup.host.mapping import HostMapping, quote_table


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
    """A column that can't be what it is mapped as, and what to do about it."""

    column: Column
    what: str
    remedy: str


def wrong_types(columns: Iterable[Column], mapping: HostMapping) -> Iterator[WrongType]:
    """Yield those of the mapped columns that could not be counted, compared or written as the mapping says."""
    for column in columns:
        wanted = _wanted(mapping, column)
        if wanted and column.type not in wanted:
            what = f"{column.table}.{column.name} is {column.type}, where trueup needs {' or '.join(sorted(wanted))}."
            yield WrongType(column=column, what=what, remedy=_remedy(column))


def local_times(columns: Iterable[Column], mapping: HostMapping) -> Iterator[Column]:
    """Yield those of the mapped columns that are times without a zone, which are read as UTC."""
    for column in columns:
        if column.type == LOCAL_TIME and column.type in _wanted(mapping, column):
            yield column


def _remedy(column: Column) -> str:
    instead = f"Map another column as host.{column.noun}.{column.field}"
    if column.is_user_id:
        return f"{instead}, or correct host.user_id_type."
    if (column.noun, column.field) == ("usage_log", "metadata"):
        return f"{instead}, or none: {column.field} = {{value = {{}}}}."
    return f"{instead}, or give this one such a type."


def mapped_columns(connection: Connection, mapping: HostMapping) -> list[Column]:
    """Return the columns that are mapped by their names, as far as they are there."""
    wanted = [
        (noun, field, getattr(mapping, noun).table, name)
        for noun in NOUNS
        for field, name in mapping.columns(noun)
        # Of what type an expression's columns are is the expression's matter.
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
    """Return the types that a column may have; none where any type will do, as for what is only shown."""
    if column.is_user_id:
        return types_of(kind for kind, id_type in ID_TYPES.items() if id_type == mapping.user_id_type)
    entry = column.entry
    return () if entry.kinds in (ID, TEXT) or entry.is_for_views else types_of(entry.kinds)
