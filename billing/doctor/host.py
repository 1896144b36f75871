"""The mapping against the real catalog: tables, columns and types."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from billing.doctor.findings import Finding, error, ok, warning
from billing.host_catalog import (
    COMPUTED_REMEDY,
    VIEWS_REMEDY,
    column_names,
    computed_log_columns,
    demanded_log_columns,
    hidden_tables,
    missing_host_columns,
    missing_host_tables,
    missing_view_columns,
)
from billing.host_changes import ROW_SECURITY_REMEDY
from billing.host_trials import wrong_expression
from billing.log_ids import log_id_problem
from billing.mapping import NOUNS, HostMapping, quote_table
from billing.partitions import partition_problem
from billing.settings import Settings

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
    "subscription.tokens_included": _NUMBERS,
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
        *_computed(connection, mapping),
        *(error("mapping", *problem) for problem in _log_problems(connection, mapping) if problem is not None),
    ]
    found += _hidden(connection, mapping)
    if not found and (wrong := wrong_expression(connection, mapping)):
        found.append(error("mapping", *wrong))
    found += _view_columns(connection, mapping)
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
    candidates = [table for table in there if table not in mapping.tables()]
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
    missing = set(missing_host_columns(connection, mapping))
    for noun in NOUNS:
        table, names = getattr(mapping, noun).table, mapping.columns(noun)
        if table in gone:
            continue
        for field, column in names:
            if f"{table}.{column}" in missing:
                missing.discard(f"{table}.{column}")  # two nouns may share a table
                yield _missing_column(connection, mapping, noun, field, column)


def _missing_column(connection: Connection, mapping: HostMapping, noun: str, field: str, column: str) -> Finding:
    table = getattr(mapping, noun).table
    mapped = {name for _, name in mapping.columns(noun)}
    free = [name for name in column_names(connection, table) if name not in mapped]
    near = _nearest(column, free) or _nearest(field, free)
    return error(
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


def _computed(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    for column in computed_log_columns(connection, mapping):
        what = f"{column} is computed by the database, and trueup's rows give it a value: every charge fails."
        yield error("mapping", what, COMPUTED_REMEDY, column=column)


def _view_columns(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    missing = missing_view_columns(connection, mapping)
    if missing:
        yield warning(
            "mapping",
            f"There is no column {', '.join(missing)}: the account and plan views of the API can't be served.",
            VIEWS_REMEDY,
            columns=missing,
        )


def _hidden(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    hidden = hidden_tables(connection, mapping)
    if hidden:
        yield error(
            "mapping",
            f"Row-level security hides rows of {', '.join(hidden)} from this role: what reads them is refused.",
            ROW_SECURITY_REMEDY,
            tables=hidden,
        )


def _log_problems(connection: Connection, mapping: HostMapping) -> list[tuple[str, str] | None]:
    if mapping.usage_log.id not in column_names(connection, mapping.usage_log.table):
        return []
    return [log_id_problem(connection, mapping), partition_problem(connection, mapping)]


def _mapped_columns(connection: Connection, mapping: HostMapping) -> list[Column]:
    wanted = [
        (f"{noun}.{field}", getattr(mapping, noun).table, name)
        for noun in NOUNS
        for field, name in mapping.columns(noun)
        # Of what type an expression's columns are is the expression's matter.
        if getattr(getattr(mapping, noun), field) == name
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
    return _TYPES.get(field, frozenset())


def _noun_of(mapping: HostMapping, table: str) -> str:
    return next(noun for noun in NOUNS if getattr(mapping, noun).table == table)


def _nearest(name: str, there: Iterable[Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, [str(known) for known in there], n=1, cutoff=0.5)), None)
