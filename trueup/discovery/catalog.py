"""A database's tables by its catalog: names, columns, keys, indexes, estimates, and the role's rights.

Every role may read the catalog. This module reads no row of the host's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA
from trueup.errors import InvalidInputError
from trueup.host.fields import Kind, kind_of
from trueup.host.setting_values import DEFAULT_SCHEMA

MAX_TABLES = 20_000


@dataclass(frozen=True, kw_only=True)
class HostColumn:
    """A column. `required`: each new row must give it a value. `computed`: no row may. `labels`: an enum's values."""

    name: str
    type: str
    kind: Kind
    required: bool
    computed: bool = False
    labels: tuple[str, ...] = ()


@dataclass(kw_only=True)
class HostTable:
    """A table that the host may own. `rows`: the server's estimate; None: there is none.

    `usable`: the role may use its schema. `may_select`: the role may read all its columns. `visible`: it is found
    without its schema. `references`: by column, the oid of the table that a foreign key of this single column
    references. `unique`: columns that are unique by themselves. `primary_key`: its columns; a partitioned table's key
    has several. `leading`: the columns of each index over all rows, in order.
    """

    oid: int
    schema: str
    name: str
    rows: int | None
    usable: bool
    may_select: bool
    columns: dict[str, HostColumn] = field(default_factory=dict)
    primary_key: tuple[str, ...] = ()
    unique: set[str] = field(default_factory=set)
    leading: list[list[str]] = field(default_factory=list)
    references: dict[str, int] = field(default_factory=dict)

    @property
    def readable(self) -> bool:
        return self.usable and self.may_select

    @property
    def setting(self) -> str:
        """The table as the mapping names it, without the default schema."""
        return self.name if self.schema == DEFAULT_SCHEMA else f"{self.schema}.{self.name}"

    @property
    def mappable(self) -> bool:
        """Whether the mapping can name the table: a dot in a name looks like the one between schema and table."""
        return "." not in self.schema and "." not in self.name and "$$" not in self.schema + self.name


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The tables that a host may own, by oid, and the current role."""

    role: str
    tables: dict[int, HostTable]

    def __iter__(self) -> Iterator[HostTable]:
        return iter(self.tables.values())


# Without partitions, which belong to their parent, and without views, which can't have the log's triggers.
_TABLES = text(
    r"""
    SELECT c.oid\:\:bigint AS oid, n.nspname AS schema, c.relname AS name,
           has_schema_privilege(n.oid, 'USAGE') AS usable, has_table_privilege(c.oid, 'SELECT') AS may_select,
           CASE WHEN c.relkind = 'p'
                THEN (SELECT CAST(sum(greatest(p.reltuples, 0)) AS bigint)
                      FROM pg_partition_tree(c.oid) t JOIN pg_class p ON p.oid = t.relid WHERE t.isleaf)
                WHEN c.reltuples >= 0 THEN CAST(c.reltuples AS bigint) END AS rows
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
      AND n.nspname <> 'information_schema' AND n.nspname <> :own AND n.nspname NOT LIKE 'pg\_%'
      AND (CAST(:schemas AS text[]) IS NULL OR n.nspname = ANY (CAST(:schemas AS text[])))
    ORDER BY n.nspname, c.relname
    LIMIT :most
    """
)
_COLUMNS = text(
    r"""
    SELECT a.attrelid\:\:bigint AS oid, a.attname AS name, format_type(b.oid, NULL) AS type,
           a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS required,
           a.attgenerated <> '' AS computed,
           ARRAY(SELECT CAST(e.enumlabel AS text) FROM pg_enum e WHERE e.enumtypid = b.oid
                 ORDER BY e.enumsortorder) AS labels
    FROM pg_attribute a
    JOIN pg_type t ON t.oid = a.atttypid
    JOIN pg_type b ON b.oid = CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
    WHERE a.attrelid\:\:bigint = ANY (CAST(:oids AS bigint[])) AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attrelid, a.attnum
    """
)
_INDEXES = text(
    r"""
    SELECT i.indrelid\:\:bigint AS oid, i.indisunique AS unique, i.indisprimary AS primary,
           ARRAY(SELECT CAST(a.attname AS text)
                 FROM unnest(i.indkey\:\:int2[]) WITH ORDINALITY AS k (number, place)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                 WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns,
           i.indnkeyatts AS keys
    FROM pg_index i
    WHERE i.indrelid\:\:bigint = ANY (CAST(:oids AS bigint[])) AND i.indisvalid AND i.indpred IS NULL
    ORDER BY i.indrelid, i.indexrelid
    """
)
_REFERENCES = text(
    r"""
    SELECT k.conrelid\:\:bigint AS oid, a.attname AS name, k.confrelid\:\:bigint AS leads_to
    FROM pg_constraint k JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = k.conkey[1]
    WHERE k.contype = 'f' AND cardinality(k.conkey) = 1 AND k.conrelid\:\:bigint = ANY (CAST(:oids AS bigint[]))
    ORDER BY k.conrelid, k.oid
    """
)


def read_catalog(connection: Connection, schemas: Sequence[str] = ()) -> Catalog:
    """Return the tables of these schemas; none given: of all schemas except the server's and trueup's.

    Raises `InvalidInputError` for an unknown schema, and for a database with more than `MAX_TABLES` tables.
    """
    known = set(connection.scalars(text("SELECT CAST(nspname AS text) FROM pg_namespace")))
    for schema in schemas:
        if schema not in known:
            raise InvalidInputError(f"schema: the database has no schema {schema!r}. Check the spelling and the case")
    values = {"own": SCHEMA, "schemas": list(schemas) or None, "most": MAX_TABLES + 1}
    tables = {row["oid"]: HostTable(**row) for row in connection.execute(_TABLES, values).mappings()}
    if len(tables) > MAX_TABLES:
        raise InvalidInputError(
            f"schema: the database has more than {MAX_TABLES:,} tables. Name one schema with --schema"
        )
    oids = {"oids": list(tables)}
    for row in connection.execute(_COLUMNS, oids):
        column: dict[str, Any] = {**row._mapping, "kind": kind_of(row.type, row.labels), "labels": tuple(row.labels)}
        table = tables[column.pop("oid")]
        table.columns[row.name] = HostColumn(**column)
    for row in connection.execute(_INDEXES, oids):
        table = tables[row.oid]
        table.leading.append(list(row.columns))
        if row.unique and row.keys == len(row.columns) == 1:
            table.unique.add(row.columns[0])
        if row.primary:
            table.primary_key = tuple(row.columns)
    for row in connection.execute(_REFERENCES, oids):
        tables[row.oid].references.setdefault(row.name, row.leads_to)
    return Catalog(role=str(connection.scalar(text("SELECT current_user"))), tables=tables)
