"""The host's tables: whether the mapping fits the catalog, the indexes that trueup needs, and free ids in the log."""

import difflib
from collections.abc import Iterable, Iterator
from functools import partial
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
    local_times,
    mapped_columns,
    missing_host_columns,
    missing_host_tables,
    missing_view_columns,
    wrong_types,
)
from trueup.host.expressions import Problem, wrong_expression
from trueup.host.fields import NOUNS, Noun
from trueup.host.log_ids import log_id_problem, log_id_sequence
from trueup.host.mapping import HostMapping, quote_identifier, quote_table
from trueup.host.partitions import partition_problem
from trueup.host.questions import open_questions
from trueup.host.schema_changes import ROW_SECURITY_REMEDY
from trueup.host.setting_values import DEFAULT_SCHEMA, quote_literal
from trueup.install.trial_writes import trial_problem
from trueup.install.write_probe import row_problem
from trueup.settings.settings import Settings

_warning, _error = partial(warning, "mapping"), partial(error, "mapping")
# With this many rows, building a balance without an index makes its user wait.
LARGE_LOG_ROWS = 10_000
LOG_IDS_NEAR_END = 0.9

# `most`: the maximum of the sequence or of the column, the smaller one. `indexed`: max(id) is cheap.
_LOG_ID_STATE = """
    SELECT s.last, least(s.seqmax, CASE a.atttypid WHEN CAST('smallint' AS regtype) THEN 32767
                                                   WHEN CAST('integer' AS regtype) THEN 2147483647
                                                   ELSE s.seqmax END) AS most,
           EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum
                                            AND i.indisvalid AND i.indpred IS NULL) AS indexed
    FROM pg_attribute a, (
        SELECT coalesce(pg_sequence_last_value(q.seqrelid), q.seqstart - q.seqincrement) AS last, q.seqmax
        FROM pg_sequence q WHERE q.seqrelid = CAST(:sequence AS regclass) AND q.seqincrement > 0
          AND has_sequence_privilege(q.seqrelid, 'USAGE, SELECT')) s
    WHERE a.attrelid = to_regclass(:table) AND a.attname = :column
"""


def check_mapping(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield each mapped table and column that is missing, with the nearest existing name, or has a wrong type."""
    mapping = settings.host
    found = [
        *_tables(connection, mapping),
        *_columns(connection, mapping),
        *_types(connection, mapping),
        *_log_columns(connection, mapping),
        *(_error(*problem) for problem in _log_problems(connection, mapping) if problem is not None),
    ]
    found += _hidden(connection, mapping)
    if all(finding.level != "error" for finding in found):
        found += [_error(*problem) for problem in _trial_problems(connection, mapping) if problem is not None]
        found += _questions(connection, mapping)
    found += _view_columns(connection, mapping)
    yield from found or [ok("mapping", "Every mapped table and column exists and has a suitable type.")]


def _tables(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    missing = missing_host_tables(connection, mapping)
    if not missing:
        return
    existing = connection.scalars(
        text(
            "SELECT CASE WHEN n.nspname = :default THEN c.relname ELSE n.nspname || '.' || c.relname END "
            "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') "
            "AND n.nspname NOT IN ('information_schema', 'trueup') AND n.nspname !~ '^pg_'"
        ),
        {"default": DEFAULT_SCHEMA},
    )
    candidates = [table for table in existing if table not in mapping.tables()]
    for table in missing:
        near = _nearest(table, candidates)
        noun = next(noun for noun in NOUNS if getattr(mapping, noun).table == table)
        what = f"There is no table {table}{f'; the nearest name is {near}' if near else ''}."
        remedy = f"Set host.{noun}.table in trueup.toml, then run `trueup db attach`."
        yield _error(what, remedy, table=table, nearest=near)


def _columns(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    missing_tables = set(missing_host_tables(connection, mapping))
    missing = set(missing_host_columns(connection, mapping))
    for noun in NOUNS:
        table, names = getattr(mapping, noun).table, mapping.columns(noun)
        if table in missing_tables:
            continue
        for field, column in names:
            if f"{table}.{column}" in missing:
                missing.discard(f"{table}.{column}")  # two fields may name the same column
                yield _missing_column(connection, mapping, noun, field, column)


def _missing_column(connection: Connection, mapping: HostMapping, noun: Noun, field: str, column: str) -> Finding:
    table = getattr(mapping, noun).table
    mapped = {name for _, name in mapping.columns(noun)}
    free = [name for name in column_names(connection, table) if name not in mapped]
    near = _nearest(column, free) or _nearest(field, free)
    what = f"{table} has no column {column}{f'; the nearest name is {near}' if near else ''}."
    remedy = f"If a migration renamed it, set host.{noun}.{field} in trueup.toml, then run `trueup db attach`."
    return _error(what, remedy, table=table, column=column, nearest=near, free_columns=free)


def _types(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    columns = mapped_columns(connection, mapping)
    for wrong in wrong_types(columns, mapping):
        column = wrong.column
        yield _error(wrong.what, wrong.remedy, table=column.table, column=column.name, type=column.type)
    for column in local_times(columns, mapping) if mapping.time_zone is None else ():
        what = f"{column.table}.{column.name} has no time zone: trueup reads it as UTC."
        remedy = (
            "If the host writes local times, periods start at the wrong time. Set time_zone under [host] to their zone "
            '("UTC" if they are UTC), or change the column to timestamptz.'
        )
        yield _warning(what, remedy, table=column.table, column=column.name)


def _log_columns(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    for column in demanded_log_columns(connection, mapping):
        what = f"{column} is required in each row of the log, but trueup's rows do not set it: every charge fails."
        yield _error(what, "Give the column a default in the database.", column=column)
    for column in computed_log_columns(connection, mapping):
        what = f"The database computes {column}, but trueup's rows set it: every charge fails."
        yield _error(what, COMPUTED_REMEDY, column=column)


def _view_columns(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    missing = missing_view_columns(connection, mapping)
    if missing:
        what = f"There is no column {', '.join(missing)}: the API's account and plan views fail."
        yield _warning(what, VIEWS_REMEDY, columns=missing)


def _hidden(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    hidden = hidden_tables(connection, mapping)
    if hidden:
        what = f"Row-level security hides rows of {', '.join(hidden)} from this role: trueup refuses to read them."
        yield _error(what, ROW_SECURITY_REMEDY, tables=hidden)


def _log_problems(connection: Connection, mapping: HostMapping) -> list[tuple[str, str] | None]:
    if mapping.usage_log.id not in column_names(connection, mapping.usage_log.table):
        return []
    return [log_id_problem(connection, mapping), partition_problem(connection, mapping)]


def _trial_problems(connection: Connection, mapping: HostMapping) -> Iterator[Problem | None]:
    yield wrong_expression(connection, mapping)
    with connection.engine.begin() as trial:
        yield row_problem(trial, mapping)
        yield trial_problem(trial, mapping)


def _questions(connection: Connection, mapping: HostMapping) -> Iterator[Finding]:
    with connection.engine.begin() as trial:
        for question in open_questions(trial, mapping):
            level = _error if question.is_blocking else _warning
            remedy = f"In trueup.toml, {question.remedy}; then run `trueup db attach`."
            yield level(f"{question.what}.", remedy, setting=question.setting)


def _nearest(name: str, existing: Iterable[Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, map(str, existing), n=1, cutoff=0.5)), None)


def check_log_index(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that an index finds a user's log rows since a given time."""
    log = settings.host.usage_log
    wanted = [log.user_id, log.created_at]
    if not set(wanted) <= set(column_names(connection, log.table)):
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
    what = f"{log.table} has no usable index on ({', '.join(wanted)}): building a balance {slow}, under its lock."
    yield level("log_index", what, f"Run: {' '.join(statements)}", statements=statements)


def check_subscription_index(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that a user can have only one subscription, because trueup depends on that."""
    names = settings.host.subscription
    table, column = quote_table(names.table), quote_identifier(names.user_id)
    if names.user_id not in column_names(connection, names.table):
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
        what = f"{double} users have several rows in {names.table}: trueup needs one row for each user."
        remedy = f"Remove or merge the extra rows, then run: {statement}"
        yield error("subscription_index", what, remedy, users=double, statements=[statement])
    else:
        what = f"No unique index prevents a second row of a user in {names.table}. No user has two rows now."
        yield warning("subscription_index", what, f"Run: {statement}", users=0, statements=[statement])


# Indexes without a WHERE clause. In `columns`, NULL stands for an expression.
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
    """Return the statements that create the index without blocking the host's writes.

    For a partitioned table, the partitions come first: the parent's index then adopts theirs instead of building each
    under a lock.
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


def check_log_ids(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that the log's id sequence is not exhausted and is above all existing ids."""
    log, sequence = settings.host.usage_log, log_id_sequence(connection, settings.host)
    values = {"sequence": sequence, "table": quote_table(log.table), "column": log.id}
    state = connection.execute(text(_LOG_ID_STATE), values).one_or_none() if sequence else None
    if state is None:
        yield ok("log_ids", f"No sequence that could end gives the ids of trueup's rows in {log.table}.")
        return
    column, table = quote_identifier(log.id), quote_table(log.table)
    ends = text(f"SELECT CAST(max({column}) AS bigint) FROM {table}".replace(":", r"\:"))
    highest = connection.scalar(ends) if state.indexed else None
    used = round(state.last / state.most, 3)
    if highest is not None and highest > state.last:
        what = f"{sequence} is at {state.last}, below the highest id {highest}: charges that draw an existing id fail."
        remedy = f"Run: SELECT setval({quote_literal(str(sequence))}, (SELECT max({column}) FROM {table}));"
        yield error("log_ids", what, remedy, sequence=sequence, last=state.last, highest_id=highest)
    elif used >= LOG_IDS_NEAR_END:
        yield warning(
            "log_ids",
            f"{used:.1%} of the ids that {sequence} and its column can hold are used. After the last, charges fail.",
            "At a time when the host can wait, run: "
            f"ALTER TABLE {table} ALTER {column} TYPE bigint; ALTER SEQUENCE {sequence} AS bigint;",
            sequence=sequence,
            used=used,
        )
    else:
        yield ok("log_ids", f"{sequence} has free ids and is above all existing ids.", sequence=sequence, used=used)
