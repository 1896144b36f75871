"""Check that the mapped tables and columns exist, have the right types and are readable; by the catalog alone."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from trueup.errors import NotInstalledError, TrueupError
from trueup.host.expressions import wrong_expression
from trueup.host.fields import FIELDS, ID_TYPES, NOUNS, TABLES, Noun, kind_of
from trueup.host.mapping import HostMapping, UserIdType, quote_identifier, quote_table
from trueup.host.setting_values import DEFAULT_SCHEMA

# A table of fewer bytes needs no index.
_SMALL = 2_000_000

_COLUMNS = text(
    """
    SELECT t.noun, t.field, c.oid IS NOT NULL AS has_table, a.attname IS NOT NULL AS has_column,
           format_type(b.oid, NULL) AS type, b.typtype = 'e' AS is_enum,
           n.nspname AS schema, coalesce(has_schema_privilege(n.oid, 'USAGE'), false) AS usable,
           coalesce(has_column_privilege(c.oid, a.attnum, 'SELECT'), false) AS readable,
           coalesce(row_security_active(c.oid), false) AS filtered
    FROM unnest(CAST(:nouns AS text[]), CAST(:fields AS text[]), CAST(:schemas AS text[]), CAST(:tables AS text[]),
                CAST(:columns AS text[])) WITH ORDINALITY AS t (noun, field, schema, name, wanted, place)
    LEFT JOIN LATERAL (
        SELECT k.* FROM pg_class k JOIN pg_namespace m ON m.oid = k.relnamespace
        WHERE k.relname = t.name AND k.relkind IN ('r', 'p', 'v', 'm', 'f')
          AND m.nspname = t.schema) c ON true
    LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = t.wanted AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_type d ON d.oid = a.atttypid
    LEFT JOIN pg_type b ON b.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END
    ORDER BY t.place
    """
)
_THERE = text(
    """
    SELECT name FROM unnest(CAST(:names AS text[])) AS name
    WHERE has_table_privilege(to_regclass(:schema || '.' || name), 'SELECT') ORDER BY name
    """
)
# The table or each of its partitions may have the index.
_HAS_INDEX = text(
    """
    SELECT coalesce(bool_and(pg_relation_size(k.leaf) < :small OR EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = k.leaf AND i.indisvalid AND i.indpred IS NULL AND a.attname = :column)), false)
    FROM (SELECT CAST(CAST(:table AS text) AS regclass) AS leaf
          WHERE NOT EXISTS (SELECT FROM pg_partition_tree(CAST(CAST(:table AS text) AS regclass)) p WHERE NOT p.isleaf)
          UNION ALL
          SELECT t.relid FROM pg_partition_tree(CAST(CAST(:table AS text) AS regclass)) t WHERE t.isleaf) k
    """
)
_OWN = text(
    """
    -- Of `installation`, a role for reports may read all columns but the secret.
    SELECT has_schema_privilege(n.oid, 'USAGE') AND coalesce(bool_and(has_any_column_privilege(c.oid, 'SELECT')), true)
    FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind = 'r'
    WHERE n.nspname = 'trueup' GROUP BY n.oid
    HAVING bool_or(c.relname = 'installation')
    """
)


@dataclass(frozen=True, kw_only=True)
class Named:
    """A column that a statement needs, as mapped. `is_part`: a condition or an expression reads it."""

    noun: Noun
    field: str
    table: str
    column: str
    is_part: bool


def named_columns(fields: Collection[tuple[str, str]], mapping: HostMapping) -> list[Named]:
    """Return the columns that these fields of these tables map to or read."""
    return [
        Named(noun=noun, field=field, table=getattr(mapping, noun).table, column=column, is_part=column != given)
        for noun in NOUNS
        for field, column in mapping.columns(noun)
        for given in [getattr(getattr(mapping, noun), field)]
        # `counts` may read other columns than the one for success.
        if (noun, "success" if field == "counts" else field) in fields
    ]


def check_columns(connection: Connection, named: list[Named], user_id_type: UserIdType) -> None:
    """Raise `TrueupError` that names every column that is missing, unreadable or of a wrong type, with the remedy."""
    parts = [one.table.rpartition(".") for one in named]
    values: dict[str, list[Any]] = {
        "nouns": [one.noun for one in named],
        "fields": [one.field for one in named],
        "schemas": [schema or DEFAULT_SCHEMA for schema, _, _ in parts],
        "tables": [table for _, _, table in parts],
        "columns": [one.column for one in named],
    }
    rows = list(connection.execute(_COLUMNS, values))
    wrong = [line for one, row in zip(named, rows, strict=True) for line in _faults(one, row, user_id_type)]
    wrong += _rights(str(connection.scalar(text("SELECT current_user"))), zip(named, rows, strict=True))
    if wrong:
        raise TrueupError(
            f"[host] in trueup.toml does not fit this database: {'; '.join(dict.fromkeys(wrong))}. "
            "Nothing was read. `trueup db discover` proposes a mapping."
        )


def check_expressions(connection: Connection, mapping: HostMapping) -> None:
    """Raise `TrueupError` that names an expression of the mapping that fails on these tables."""
    wrong = wrong_expression(connection, mapping)
    if wrong is not None:
        raise TrueupError(f"[host] in trueup.toml does not fit this database: {wrong[0]} Nothing was read. {wrong[1]}")


def _faults(one: Named, row: Any, user_id_type: UserIdType) -> Iterator[str]:
    if not row.has_table:
        yield f"host.{one.noun}.table: there is no table {one.table}"
        return
    if not row.has_column:
        yield f"host.{one.noun}.{one.field}: {one.table} has no column {one.column}"
        return
    if row.filtered:
        # The scan sets row_security off, so PostgreSQL would raise an error instead of hiding rows.
        yield f"row level security would hide rows of {one.table}: connect as a role with BYPASSRLS"
    kind = kind_of(row.type, ("enum",) if row.is_enum else ())
    if one.is_part:
        return
    if one.field == "user_id" and ID_TYPES.get(kind) != user_id_type:
        yield f"host.user_id_type is {user_id_type}, but {one.table}.{one.column} is {row.type}"
        return
    kinds = FIELDS[one.noun][one.field].kinds
    if kind not in kinds:
        wanted = " or ".join(sorted(kinds))
        yield f"host.{one.noun}.{one.field}: {one.table}.{one.column} is {row.type}, which is not {wanted}"


def _rights(role: str, found: Iterable[tuple[Named, Any]]) -> Iterator[str]:
    """Yield the rights that the role lacks, a table at a time."""
    to = quote_identifier(role)
    hidden: dict[str, list[str]] = {}
    for one, row in found:
        if row.has_table and not row.usable:
            schema = quote_identifier(row.schema)
            yield f"role {role} may not use schema {row.schema}: GRANT USAGE ON SCHEMA {schema} TO {to}"
        if row.has_column and not row.readable:
            hidden.setdefault(one.table, []).append(one.column)
    for table, columns in hidden.items():
        named = ", ".join(dict.fromkeys(columns))
        yield f"role {role} may not read {table} ({named}): GRANT SELECT ON {quote_table(table)} TO {to}"


def missing_index(connection: Connection, mapping: HostMapping) -> str | None:
    """Return the statement that creates a missing index; None: nothing is missing. Evidence is too slow without one."""
    for noun, kind in TABLES.items():
        names = getattr(mapping, noun)
        table = names.table
        if kind.entry.index is None or table is None:
            continue
        column, time = (getattr(names, field) for field in kind.entry.index)
        values = {"table": quote_table(table), "column": column, "small": _SMALL}
        if not connection.execute(_HAS_INDEX, values).scalar_one():
            columns = f"{quote_identifier(column)}, {quote_identifier(time)}"
            return f"CREATE INDEX CONCURRENTLY ON {quote_table(table)} ({columns})"
    return None


def is_attached(connection: Connection, mapping: HostMapping) -> bool:
    """Return whether trueup is set up in this database, so that its grants and decisions count.

    Raises `NotInstalledError` if it is set up for another mapping, or if the role may not read its tables: without its
    grants the figures would be wrong.
    """
    readable = connection.scalar(_OWN)
    if readable is None:
        return False
    if not readable:
        raise NotInstalledError(
            "trueup is set up in this database, and this role may not read its tables. Without the grants in them the "
            "figures would be wrong. Grant it what the readonly role of `trueup db grants` has."
        )
    if connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation")) != mapping.fingerprint():
        raise NotInstalledError(
            "trueup is set up in this database for other table or column names than [host] in trueup.toml says. "
            "Restore the old names, or run `trueup db init` to set the database up for the new ones."
        )
    return True


def optional_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the readable tables with a default name of decrement rows or payments that the mapping leaves out."""
    nouns = [noun for noun in NOUNS if TABLES[noun].entry.optional and getattr(mapping, noun).table is None]
    names = [TABLES[noun].entry.default_name for noun in nouns]
    return list(connection.scalars(_THERE, {"names": names, "schema": DEFAULT_SCHEMA}))
