"""The mapping against the real catalog: tables, columns and types."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, text

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.catalog import (
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
from trueup.host.column_types import local_times, mapped_columns, wrong_types
from trueup.host.expressions import Problem, wrong_expression
from trueup.host.fields import NOUNS, Noun
from trueup.host.log_ids import log_id_problem
from trueup.host.mapping import HostMapping
from trueup.host.partitions import partition_problem
from trueup.host.schema_changes import ROW_SECURITY_REMEDY
from trueup.host.setting_values import DEFAULT_SCHEMA
from trueup.install.write_probe import row_problem
from trueup.settings.settings import Settings


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
    if all(finding.level != "error" for finding in found):
        found += [error("mapping", *problem) for problem in _tried(connection, mapping) if problem is not None]
    found += _view_columns(connection, mapping)
    yield from found or [ok("mapping", "Every mapped table and column is there, with a type that fits.")]


def _tables(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    missing = missing_host_tables(connection, mapping)
    if not missing:
        return
    there = connection.scalars(
        text(
            "SELECT CASE WHEN n.nspname = :default THEN c.relname ELSE n.nspname || '.' || c.relname END "
            "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') "
            "AND n.nspname NOT IN ('information_schema', 'trueup') AND n.nspname !~ '^pg_'"
        ),
        {"default": DEFAULT_SCHEMA},
    )
    candidates = [table for table in there if table not in mapping.tables()]
    for table in missing:
        near = _nearest(table, candidates)
        yield error(
            "mapping",
            f"There is no table {table}{f'; {near} is near' if near else ''}.",
            f"Set host.{_noun_of(mapping, table)}.table in trueup.toml, then `trueup db attach`.",
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


def _missing_column(connection: Connection, mapping: HostMapping, noun: Noun, field: str, column: str) -> Finding:
    table = getattr(mapping, noun).table
    mapped = {name for _, name in mapping.columns(noun)}
    free = [name for name in column_names(connection, table) if name not in mapped]
    near = _nearest(column, free) or _nearest(field, free)
    return error(
        "mapping",
        f"{table} has no column {column}{f'; {near} is near' if near else ''}.",
        f"If a migration renamed it, set host.{noun}.{field} in trueup.toml, then `trueup db attach`.",
        table=table,
        column=column,
        nearest=near,
        free_columns=free,
    )


def _types(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    columns = mapped_columns(connection, mapping)
    for wrong in wrong_types(columns, mapping):
        column = wrong.column
        yield error("mapping", wrong.what, wrong.remedy, table=column.table, column=column.name, type=column.type)
    for column in local_times(columns, mapping):
        yield warning(
            "mapping",
            f"{column.table}.{column.name} has no time zone: it is read as UTC.",
            "If the host writes local times there, windows begin at the wrong moment: make it timestamptz.",
            table=column.table,
            column=column.name,
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


def _tried(connection: Connection, mapping: HostMapping) -> Iterator[Problem | None]:
    yield wrong_expression(connection, mapping)
    with connection.engine.begin() as trial:
        yield row_problem(trial, mapping)


def _noun_of(mapping: HostMapping, table: str) -> str:
    return next(noun for noun in NOUNS if getattr(mapping, noun).table == table)


def _nearest(name: str, there: Iterable[Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, [str(known) for known in there], n=1, cutoff=0.5)), None)
