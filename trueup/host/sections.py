"""The sections that the host's usage log takes: any text that fits the column, or the values of its CHECK, enum or key.

A row with another section would be refused after its tokens are spent, so the section is checked before any work.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from trueup.errors import InvalidInputError
from trueup.host.fields import SECTIONS
from trueup.host.mapping import HostMapping, quote_identifier, quote_table

_NAMED = 20
# `checks`: the conditions of the checks that read this column alone. `key_table`, `key_column`: of its foreign key.
_COLUMN = text(
    r"""
    SELECT format_type(b.oid, NULL) AS type, b.typtype = 'e' AS is_enum,
           CASE WHEN b.oid = ANY (ARRAY['varchar', 'bpchar']\:\:regtype[]) AND greatest(a.atttypmod, t.typtypmod) > 4
                THEN greatest(a.atttypmod, t.typtypmod) - 4 END AS length,
           ARRAY(SELECT CAST(e.enumlabel AS text) FROM pg_enum e WHERE e.enumtypid = b.oid ORDER BY e.enumsortorder)
               AS labels,
           ARRAY(SELECT pg_get_expr(c.conbin, c.conrelid) FROM pg_constraint c
                 WHERE c.conrelid = a.attrelid AND c.contype = 'c' AND c.conkey = ARRAY[a.attnum] ORDER BY c.oid)
               AS checks,
           k.key_table, k.key_column
    FROM pg_attribute a
    JOIN pg_type t ON t.oid = a.atttypid
    JOIN pg_type b ON b.oid = CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
    LEFT JOIN LATERAL (
        SELECT CAST(c.confrelid\:\:regclass AS text) AS key_table, CAST(f.attname AS text) AS key_column
        FROM pg_constraint c JOIN pg_attribute f ON f.attrelid = c.confrelid AND f.attnum = c.confkey[1]
        WHERE c.conrelid = a.attrelid AND c.contype = 'f' AND c.conkey = ARRAY[a.attnum]
          AND has_column_privilege(c.confrelid, c.confkey[1], 'SELECT') LIMIT 1) k ON true
    WHERE a.attrelid = to_regclass(:table) AND a.attname = :column AND a.attnum > 0
    """
)
_WORD = re.compile(r"'((?:[^']|'')*)'")

# By engine: the mapping for which a section was found to fit.
_fitting: WeakKeyDictionary[Engine, dict[str, HostMapping]] = WeakKeyDictionary()


def require_section(connection: Connection, mapping: HostMapping, section: str) -> None:
    """Raise `InvalidInputError` if the host's log refuses rows of this section. A section that fits is tried once."""
    known = _fitting.setdefault(connection.engine, {})
    if known.get(section) is mapping:
        return
    column = _column(connection, mapping)
    if column is not None and not _fits(connection, mapping, column, section):
        values = [value for value in _values(connection, column) if _fits(connection, mapping, column, value)]
        log = mapping.usage_log
        if values:
            remedy = f"Use one of {', '.join(values[:_NAMED])}"
        elif column.length is not None:
            remedy = f"Use at most {column.length} characters"
        else:
            remedy = "Use a value that the column takes"
        raise InvalidInputError(f"section: {log.table}.{log.section} does not take {section!r}. {remedy}.")
    known[section] = mapping


def usable_sections(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return sections that the log takes: trueup's own, else the host's; none if none is known."""
    column = _column(connection, mapping)
    if column is None:
        return sorted(SECTIONS)
    own = [section for section in sorted(SECTIONS) if _fits(connection, mapping, column, section)]
    return own or [value for value in _values(connection, column) if _fits(connection, mapping, column, value)]


def _column(connection: Connection, mapping: HostMapping) -> Row[Any] | None:
    """Return the facts about the section's column; None if trueup writes none."""
    log = mapping.usage_log
    if not isinstance(log.section, str) or log.record == "host":
        return None
    values = {"table": quote_table(log.table), "column": log.section}
    return connection.execute(_COLUMN, values).one_or_none()


def _values(connection: Connection, column: Row[Any]) -> Iterator[str]:
    """Yield the values that an enum has, that a check names or that a referenced table holds."""
    yield from column.labels
    for check in column.checks:
        yield from (word.replace("''", "'") for word in _WORD.findall(check))
    if column.key_table is not None:
        name = quote_identifier(column.key_column)
        statement = f"SELECT CAST({name} AS text) FROM {column.key_table} ORDER BY 1 LIMIT {_NAMED}"
        yield from connection.exec_driver_sql(statement.replace("%", "%%")).scalars()


def _fits(connection: Connection, mapping: HostMapping, column: Row[Any], section: str) -> bool:
    if column.is_enum and section not in column.labels:
        return False
    if column.length is not None and len(section) > column.length:
        return False
    conditions = [f"({check}) IS NOT FALSE" for check in column.checks]
    if column.key_table is not None:
        name = quote_identifier(column.key_column)
        conditions.append(f"EXISTS (SELECT FROM {column.key_table} k WHERE CAST(k.{name} AS text) = %(section)s)")
    if not conditions:
        return True
    tried = " AND ".join(conditions[: len(column.checks)]).replace("%", "%%")
    tried = " AND ".join(filter(None, [tried, *conditions[len(column.checks) :]]))
    source = f"(SELECT CAST(%(section)s AS {column.type}) AS {quote_identifier(str(mapping.usage_log.section))}) AS row"
    driver: Any = connection.connection.driver_connection
    try:
        with nullcontext() if driver.autocommit else connection.begin_nested():
            fits = connection.exec_driver_sql(f"SELECT {tried} FROM {source}", {"section": section}).scalar_one()
            return bool(fits)
    except DBAPIError:
        if connection.invalidated:
            raise
        return True  # a check that can't be tried by itself; the charge is owed if it refuses the row
