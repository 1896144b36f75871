"""The mapping against the real catalog: tables, columns and types, and the indexes that trueup leans on."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from billing.doctor.findings import Finding, error, ok, warning
from billing.host_tables import demanded_log_columns, missing_host_columns, missing_host_tables
from billing.mapping import HostMapping, quote_identifier, quote_table
from billing.settings import Settings

NOUNS = ("user", "token_plan", "full_plan", "subscription", "usage_log", "token_usage", "payment")

_NUMBERS = frozenset({"smallint", "integer", "bigint"})
_TEXTS = frozenset({"text", "character varying", "character"})
_IDS = {"bigint": _NUMBERS, "uuid": frozenset({"uuid"}), "text": _TEXTS}
_TIME = frozenset({"timestamp with time zone"})
_FLAG = frozenset({"boolean"})
# What a column must be, by its place in the mapping; ids of users and log rows are as the mapping says.
_TYPES = {
    "token_plan.tokens_included": _NUMBERS,
    "full_plan.tokens_included": _NUMBERS,
    "subscription.start_date": _TIME,
    "subscription.end_date": _TIME,
    "subscription.tokens_remaining": _NUMBERS,
    "subscription.is_active": _FLAG,
    "usage_log.prompt_tokens": _NUMBERS,
    "usage_log.completion_tokens": _NUMBERS,
    "usage_log.total_tokens": _NUMBERS,
    "usage_log.success": _FLAG,
    "usage_log.metadata": frozenset({"jsonb"}),
    "usage_log.created_at": _TIME,
    "token_usage.used_tokens": _NUMBERS,
    "token_usage.usage_date": _TIME,
    "payment.payment_date": _TIME,
}
# From so many rows on, a balance that is built without an index keeps its user waiting.
LARGE_LOG_ROWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Column:
    """A mapped column as the catalog has it. `field`: its place in the mapping, "usage_log.total_tokens", say."""

    field: str
    table: str
    name: str
    type: str


def check_mapping(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield each mapped table and column that is not there, with the nearest name that is, and each of another type."""
    mapping = settings.host
    found = [
        *_tables(connection, mapping),
        *_columns(connection, mapping),
        *_types(connection, mapping),
        *_demanded(connection, mapping),
    ]
    yield from found or [ok("mapping", "Every mapped table and column is there, with a type that fits.")]


def _tables(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    missing = missing_host_tables(connection, mapping)
    if not missing:
        return
    there = connection.scalars(
        text(
            "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname ELSE n.nspname || '.' || c.relname END "
            "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') "
            "AND n.nspname NOT IN ('information_schema', 'trueup') AND n.nspname !~ '^pg_'"
        )
    )
    mapped = {getattr(mapping, noun).table for noun in NOUNS}
    candidates = [table for table in there if table not in mapped]
    for table in missing:
        near = _nearest(table, candidates)
        yield error(
            "mapping",
            f"There is no table {table}{f'; {near} is near' if near else ''}.",
            f"Set host.{_noun_of(mapping, table)}.table in trueup.toml, then `trueup db init`.",
            table=table,
            nearest=near,
        )


def _columns(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    gone = set(missing_host_tables(connection, mapping))
    for missing in missing_host_columns(connection, mapping):
        table = next(t for noun in NOUNS if (t := getattr(mapping, noun).table) and missing.startswith(f"{t}."))
        if table in gone:
            continue
        noun, column = _noun_of(mapping, table), missing.removeprefix(f"{table}.")
        names = getattr(mapping, noun).model_dump(exclude={"table", "completed_status"})
        field = next(field for field, name in names.items() if name == column)
        free = [name for name in _names(connection, table) if name not in names.values()]
        near = _nearest(column, free) or _nearest(field, free)
        yield error(
            "mapping",
            f"{table} has no column {column}{f'; {near} is near' if near else ''}.",
            f"If a migration renamed it, set host.{noun}.{field} in trueup.toml, then `trueup db init`.",
            table=table,
            column=column,
            nearest=near,
            free_columns=free,
        )


def _types(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    for column in _mapped_columns(connection, mapping):
        wanted = _wanted(mapping, column.field)
        if wanted and column.type not in wanted:
            yield error(
                "mapping",
                f"{column.table}.{column.name} is {column.type}, where trueup needs {' or '.join(sorted(wanted))}.",
                f"Map another column as host.{column.field}, or correct the user's or log's id type under [host].",
                table=column.table,
                column=column.name,
                type=column.type,
            )


def _demanded(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    for column in demanded_log_columns(connection, mapping):
        yield error(
            "mapping",
            f"{column} must be given in each row of the log, and trueup's rows don't: every charge fails.",
            "Give the column a default in the database.",
            column=column,
        )


def check_log_index(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether a user's rows since a time can be found in the log without reading it all."""
    log = settings.host.usage_log
    wanted = [log.user_id, log.created_at]
    if not set(wanted) <= set(_names(connection, log.table)):
        return  # the mapping's check says so
    leading = connection.execute(_INDEXES, {"table": quote_table(log.table)}).all()
    if any(index.valid and index.columns[:2] == wanted for index in leading):
        yield ok("log_index", f"{log.table} has an index on ({', '.join(wanted)}).")
        return
    statement = text("SELECT reltuples FROM pg_class WHERE oid = to_regclass(:table)")
    rows = connection.execute(statement, {"table": quote_table(log.table)}).scalar_one()
    statements = _index_statements(connection, log.table, wanted)
    broken = [index.name for index in leading if not index.valid and index.columns[:2] == wanted]
    if broken:
        statements.insert(0, f"DROP INDEX CONCURRENTLY {broken[0]};")
    partly = any(index.valid and index.columns[:1] == wanted[:1] for index in leading)
    level = warning if partly or rows < LARGE_LOG_ROWS else error
    slow = "reads all rows of the user" if partly else "reads the whole log"
    yield level(
        "log_index",
        f"{log.table} has no usable index on ({', '.join(wanted)}): building a balance {slow}, under its lock.",
        f"Run: {' '.join(statements)}",
        statements=statements,
    )


def check_subscription_index(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether a user can have only one subscription, which every decision takes for granted."""
    names = settings.host.subscription
    table, column = quote_table(names.table), quote_identifier(names.user_id)
    if names.user_id not in _names(connection, names.table):
        return  # the mapping's check says so
    indexes = connection.execute(_INDEXES, {"table": table})
    if any(index.valid and index.single and index.columns == [names.user_id] for index in indexes):
        yield ok("subscription_index", f"{names.table}.{names.user_id} is unique.")
        return
    double = connection.scalar(
        text(
            f"SELECT count(*) FROM (SELECT FROM {table} WHERE {column} IS NOT NULL "
            f"GROUP BY {column} HAVING count(*) > 1) AS t"
        )
    )
    statement = f"CREATE UNIQUE INDEX CONCURRENTLY ON {table} ({column});"
    if double:
        yield error(
            "subscription_index",
            f"{double} users have several rows in {names.table}, where trueup takes one for granted.",
            f"Remove or merge what is too many, then run: {statement}",
            users=double,
            statements=[statement],
        )
    else:
        yield warning(
            "subscription_index",
            f"Nothing keeps a user from having two rows in {names.table}; none has now.",
            f"Run: {statement}",
            users=0,
            statements=[statement],
        )


# Whole tables' indexes on plain columns; NULL stands for an expression.
_INDEXES = text(
    """
    SELECT CAST(i.indexrelid AS regclass)::text AS name, i.indisvalid AND i.indisready AS valid,
           i.indisunique AS single,
           ARRAY(SELECT CAST(a.attname AS text) FROM unnest(i.indkey) WITH ORDINALITY AS k (number, place)
                 LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                 WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
    WHERE i.indrelid = to_regclass(:table) AND m.amname = 'btree' AND i.indpred IS NULL
    """.replace("::", r"\:\:")
)


def _index_statements(connection: Connection, table: str, columns: Iterable[str]) -> list[str]:
    """Return what makes the index while the host goes on writing.

    A partitioned table's last: it takes over those of its partitions, where it would else build each under a lock.
    """
    listed = ", ".join(map(quote_identifier, columns))
    leaves = connection.scalars(
        text(
            "SELECT CAST(t.relid AS text) FROM pg_partition_tree(to_regclass(:table)) t "
            "WHERE t.isleaf AND t.level > 0 ORDER BY 1"
        ),
        {"table": quote_table(table)},
    ).all()
    concurrently = [f"CREATE INDEX CONCURRENTLY ON {leaf} ({listed});" for leaf in leaves or [quote_table(table)]]
    return concurrently + ([f"CREATE INDEX ON {quote_table(table)} ({listed});"] if leaves else [])


def _mapped_columns(connection: Connection, mapping: HostMapping) -> list[Column]:
    wanted = [
        (f"{noun}.{field}", names.table, name)
        for noun in NOUNS
        if (names := getattr(mapping, noun)).table is not None
        for field, name in names.model_dump(exclude={"table", "completed_status"}).items()
    ]
    rows = connection.execute(
        text(
            """
            SELECT w.field, w.name AS table, w.column AS name,
                   format_type(CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END, NULL) AS type
            FROM unnest(CAST(:fields AS text[]), CAST(:names AS text[]), CAST(:quoted AS text[]),
                        CAST(:columns AS text[])) WITH ORDINALITY AS w (field, name, quoted, "column", place)
            JOIN pg_attribute a ON a.attrelid = to_regclass(w.quoted) AND a.attname = w.column AND a.attnum > 0
            JOIN pg_type t ON t.oid = a.atttypid
            ORDER BY w.place
            """
        ),
        {
            "fields": [field for field, _, _ in wanted],
            "names": [table for _, table, _ in wanted],
            "quoted": [quote_table(table) for _, table, _ in wanted],
            "columns": [column for _, _, column in wanted],
        },
    )
    return [Column(**row) for row in rows.mappings()]


def _wanted(mapping: HostMapping, field: str) -> frozenset[str]:
    if field in ("user.id", "subscription.user_id", "usage_log.user_id", "payment.user_id"):
        return _IDS[mapping.user_id_type]
    if field == "usage_log.id":
        return _IDS[mapping.usage_log_id_type]
    return _TYPES.get(field, frozenset())


def _names(connection: Connection, table: str) -> list[str]:
    statement = text(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped "
        "ORDER BY attnum"
    )
    return list(connection.scalars(statement, {"table": quote_table(table)}))


def _noun_of(mapping: HostMapping, table: str) -> str:
    return next(noun for noun in NOUNS if getattr(mapping, noun).table == table)


def _nearest(name: str, there: Iterable[Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, [str(known) for known in there], n=1, cutoff=0.5)), None)
