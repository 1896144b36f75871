"""Trials of the mapping's conditions and expressions, on a temporary table that is rolled back.

The table has the columns of the host's table and no rows. A trial locks, reads and writes nothing of the host's.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Connection, CursorResult, text
from sqlalchemy.exc import DBAPIError

from trueup.host.fields import FIELDS, FLAG, INTEGER, JSON, TIME, types_of
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.setting_values import Compared, Expression, quote_identifier, quote_literal
from trueup.host.sql import render_sql

_TOKENS = types_of(INTEGER)
# A caller that is no session of trueup's may have another one.
_SET_SEARCH_PATH = text("SELECT set_config('search_path', 'pg_catalog, pg_temp', true)")

_TABLE_ID = text("SELECT CAST(to_regclass(:table) AS oid)")
_COLUMNS = text(
    """
    SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attgenerated <> '' AS is_generated,
           CASE WHEN a.attidentity <> '' THEN '1' ELSE pg_get_expr(f.adbin, f.adrelid) END AS given
    FROM pg_attribute a LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
    WHERE a.attrelid = CAST(:id AS oid) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
    """
)
_COLUMN_TYPE = text(
    "SELECT format_type(CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END, NULL) "
    "FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
    "WHERE a.attrelid = to_regclass(:table) AND a.attname = :column"
)
# The second table makes a column without {row} ambiguous. No row is read.
_TYPE = """
    SELECT CAST(pg_typeof(tried.value) AS text)
    FROM (SELECT) AS one LEFT JOIN LATERAL (
        SELECT EXPRESSION AS value FROM HOST AS trueup_row CROSS JOIN HOST AS trueup_other LIMIT 0) AS tried ON true
"""
_OWN_ROW = """
    {% from "host/search_path.sql" import role_search_path %}
    INSERT INTO pg_temp.trueup_own AS l ({{ usage_log.written() }})
    SELECT {{ usage_log.written("r") }} FROM (SELECT {{ values }}) r CROSS JOIN {{ role_search_path() }}
    RETURNING {{ usage_log.success("l") }}
"""
_DRAWN = re.compile(r"nextval\('(?:[^']|'')*'::regclass\)")  # in a default; a trial must not draw from a sequence
_SAMPLE_UUID = "00000000-0000-4000-8000-000000000001"
# The expression under trial as PostgreSQL has parsed it.
_TRIED = """
    WITH tree AS (
        SELECT CAST(f.adbin AS text) AS nodes FROM pg_attrdef f JOIN pg_attribute a
            ON a.attrelid = f.adrelid AND a.attnum = f.adnum
        WHERE f.adrelid = to_regclass('pg_temp.trueup_row') AND a.attname = 'trueup_tried'
    )
"""
_CASTS_TEXT = r"""
    (nodes ~ '\{COERCEVIAIO' AND EXISTS (
        SELECT FROM regexp_matches(nodes, '[^a-z]resulttype (\d+)', 'g') AS used (id)
        WHERE used.id[1] NOT IN ('25', '1043')))
"""
# A condition runs in the host's own statement, which trueup must not make fail. So it may only have nodes and functions
# that can't fail; this returns the first other one.
_TREE = text(
    rf"""
    {_TRIED}
    SELECT CAST(CAST(p.oid AS regprocedure) AS text)
    FROM tree, regexp_matches(nodes, 'funcid (\d+)', 'g') AS used (id)
    JOIN pg_proc p ON p.oid = CAST(used.id[1] AS oid)
    WHERE NOT p.proleakproof
      AND NOT (p.pronamespace = CAST('pg_catalog' AS regnamespace) AND p.proname = ANY (CAST(:harmless AS text[])))
    UNION
    SELECT lower(used.name[1])
    FROM tree, regexp_matches(nodes, '\{{([A-Z]+)', 'g') AS used (name)
    WHERE used.name[1] <> ALL (CAST(:kinds AS text[]))
    UNION
    SELECT 'a cast from text' FROM tree WHERE {_CASTS_TEXT}
    LIMIT 1
    """
)
# Divisions and casts: one row can make a read of many rows fail. (An overflow of a sum is not detected.)
_DIVISIONS = text(
    rf"""
    {_TRIED}
    SELECT count(*) FILTER (WHERE p.proname ~ '(div|mod)$') AS divisions,
           {_CASTS_TEXT} OR coalesce(bool_or(p.pronargs = 1 AND p.proargtypes[0] = CAST('jsonb' AS regtype)
                                             AND p.prorettype <> ALL (CAST('{{text, jsonb}}' AS regtype[]))), false)
           AS casts
    FROM tree LEFT JOIN LATERAL regexp_matches(nodes, 'funcid (\d+)', 'g') AS used (id) ON true
    LEFT JOIN pg_proc p ON p.oid = CAST(used.id[1] AS oid) AND p.pronamespace = CAST('pg_catalog' AS regnamespace)
    GROUP BY nodes
    """
)
_BY_A_NUMBER = re.compile(r"[/%]\s*[1-9][0-9]*(?![\w.])")
_HARMLESS = """
    jsonb_object_field jsonb_object_field_text jsonb_array_element jsonb_array_element_text jsonb_exists jsonb_contains
    jsonb_eq jsonb_ne textlike textnlike texticlike texticnlike lower upper length btrim starts_with
    numeric_eq numeric_ne numeric_lt numeric_le numeric_gt numeric_ge enum_eq enum_ne
"""
# PostgreSQL's names of the nodes, before version 16 and since.
_KINDS = """
    OPEXPR DISTINCTEXPR NULLIFEXPR SCALARARRAYOPEXPR BOOLEXPR VAR CONST CASE CASEEXPR WHEN CASEWHEN CASETESTEXPR
    COALESCE COALESCEEXPR MINMAX MINMAXEXPR NULLTEST BOOLEANTEST RELABELTYPE FUNCEXPR COERCEVIAIO ARRAY ARRAYEXPR
"""
_ALLOWED = (
    "Use comparisons, AND, OR, NOT, IN, IS NULL, CASE, coalesce, LIKE, lower, upper, and -> and ->> of jsonb; or let "
    "the host compute a column."
)

Problem = tuple[str, str]
"""A problem and its remedy."""


def expression_problem(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return the first problem of the mapping's conditions, expressions and column of tokens; None: there is none.

    The trial leaves nothing in the caller's transaction. The columns that the mapping names must exist.
    """
    included = mapping.subscription.tokens_included
    if isinstance(included, str):
        values = {"table": quote_table(mapping.subscription.table), "column": included}
        problem = _type_problem(str(connection.scalar(_COLUMN_TYPE, values)), _TOKENS)
        if problem is not None:
            return f"host.subscription.tokens_included: {problem[0]}.", problem[1]

    def judge(given: Compared | Expression, table: str, types: tuple[str, ...]) -> Problem | None:
        trial = connection.begin_nested()
        try:
            return next(_problems(connection, mapping, given, table, types), None)
        finally:
            trial.rollback()

    return _first_problem(mapping, judge)


def wrong_expression(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return the first condition or expression that is not valid SQL over the host's table; None: all are valid.

    A role with SELECT rights can run this. It does not check whether an expression may fail for a row. If it finds a
    problem, the connection's transaction has failed.
    """

    def judge(given: Compared | Expression, table: str, types: tuple[str, ...]) -> Problem | None:
        if isinstance(given, Compared):
            return _value_problem(connection, given, table)
        return _type_problem(_type_of(connection, given, quote_table(table)), types)

    return _first_problem(mapping, judge)


def _first_problem(
    mapping: HostMapping, judge: Callable[[Compared | Expression, str, tuple[str, ...]], Problem | None]
) -> Problem | None:
    for setting, given, table, types in _given(mapping):
        try:
            problem = judge(given, table, types)
        except DBAPIError as error:
            problem = _sql_problem(error)
        if problem is not None:
            return f"{setting}: {problem[0]}.", problem[1]
    return None


def _given(mapping: HostMapping) -> Iterator[tuple[str, Compared | Expression, str, tuple[str, ...]]]:
    subscription, counts = mapping.subscription, mapping.usage_log.counts
    if isinstance(subscription.tokens_included, Expression):
        yield "host.subscription.tokens_included", subscription.tokens_included, subscription.table, _TOKENS
    if isinstance(subscription.is_active, Compared | Expression):
        yield "host.subscription.is_active", subscription.is_active, subscription.table, types_of(FLAG)
    if counts is not None:
        yield "host.usage_log.counts", counts, mapping.usage_log.table, types_of(FLAG)


def _value_problem(connection: Connection, given: Compared, table: str) -> Problem | None:
    """Return a problem if the column can't have a value, such as a label of an enum that the host renamed."""
    name, column = quote_literal(given.column), quote_identifier(given.column)
    values = [*given.equals, *([] if given.failed is None else [given.failed])]
    statement = (
        f"SELECT value FROM unnest(CAST(ARRAY[{', '.join(map(quote_literal, values))}] AS text[])) AS value "
        f"WHERE CAST((jsonb_populate_record(CAST(NULL AS {quote_table(table)}), jsonb_build_object({name}, value)))"
        f".{column} AS text) IS DISTINCT FROM value LIMIT 1"
    )
    wrong = run(connection, statement).scalar()
    return (
        None
        if wrong is None
        else (f"{given.column} can't have the value {wrong!r}", "Write it as PostgreSQL shows it.")
    )


def _type_problem(found: str, types: tuple[str, ...]) -> Problem | None:
    return None if found in types else (f"its type is {found}", f"Cast it: it must be {' or '.join(types)}.")


def _type_of(connection: Connection, given: Expression, table: str) -> str:
    before, after = _TYPE.split("EXPRESSION")
    statement = f"{before}{given.over('trueup_row')}{after.replace('HOST', table)}"
    return str(run(connection, statement).scalar_one())


def _problems(
    connection: Connection, mapping: HostMapping, given: Compared | Expression, table: str, types: tuple[str, ...]
) -> Iterator[Problem]:
    make_table(connection, table, "trueup_row", filled=False)
    if isinstance(given, Expression):
        found = _type_of(connection, given, "pg_temp.trueup_row")
        if problem := _type_problem(found, types):
            yield problem
        made = f"ALTER TABLE pg_temp.trueup_row ADD trueup_tried {found} GENERATED ALWAYS AS"
        run(connection, f"{made} {given.over('trueup_row')} STORED")
    if given is not mapping.usage_log.counts:
        if isinstance(given, Expression):
            yield from _failing_read(connection, given)
        elif problem := _value_problem(connection, given, "pg_temp.trueup_row"):
            yield problem
        return
    risky = connection.scalar(_TREE, {"harmless": _HARMLESS.split(), "kinds": _KINDS.split()})
    if risky is not None:
        yield (
            f"it uses {risky}, which might fail for a row, and the host's own write of the row would fail too",
            _ALLOWED,
        )
    make_table(connection, table, "trueup_own", filled=True)
    if _own_counts(connection, mapping, succeeded=True) is not True:
        yield "the rows that trueup writes would not count", "Make it true for them, or map the column that it tests."
    if mapping.usage_log.records_failure and _own_counts(connection, mapping, succeeded=False):
        yield (
            "a row that trueup writes of a failed call would count",
            "Let it depend on the column of success, or set success = {value = true}: failed calls then get no row.",
        )


def _failing_read(connection: Connection, given: Expression) -> Iterator[Problem]:
    found = connection.execute(_DIVISIONS).one()
    if found.divisions > len(_BY_A_NUMBER.findall(given.expression)):
        yield (
            "it divides by a value that may be 0 for a row, and then each read of the row would fail",
            "Divide only by a number, or let the host compute a column.",
        )
    if found.casts:
        yield (
            "it casts text or jsonb, which may fail for a row, and then each read of the row would fail",
            "Let the host compute a column.",
        )


def _own_counts(connection: Connection, mapping: HostMapping, *, succeeded: bool) -> Any:
    def counts(*, user: bool) -> Any:
        trial = connection.begin_nested()
        try:
            return run(connection, own_row(mapping, succeeded=succeeded, user=user)).scalar_one()
        finally:
            trial.rollback()

    try:
        return counts(user=True)
    except DBAPIError:  # the type of the user id may refuse the sample
        return counts(user=False)


def own_row(
    mapping: HostMapping, *, succeeded: bool, section: str = "chat", size: int = 1, model: str = "o3", user: bool = True
) -> str:
    """Return the statement that writes a row of trueup's into the table of `make_table` and returns whether it counts.

    It leaves the role's search path behind: the caller rolls its savepoint back.
    `size`: the count of tokens of each kind, and the milliseconds. `user` False: the row has no user.
    """
    log_id = "1" if mapping.usage_log_id_type == "bigint" else _SAMPLE_UUID
    user_id = quote_literal(_SAMPLE_UUID if mapping.user_id_type == "uuid" else "1") if user else "NULL"
    own = {
        "id": f"CAST({quote_literal(log_id)} AS {mapping.usage_log_id_type})",
        "user_id": f"CAST({user_id} AS {mapping.user_id_type})",
        "section": quote_literal(section),
        "total_tokens": str(2 * size),
        "success": str(succeeded).lower(),
        "model_name": quote_literal(model),
    }
    by_kind = {JSON: 'CAST(\'{"task_id": "1"}\' AS jsonb)', TIME: "CAST(now() AS timestamptz)"}
    values = [
        f"{own.get(field) or by_kind.get(entry.kinds, str(size))} AS {field}"
        for field, entry in FIELDS["usage_log"].items()
        if entry.written
    ]
    return render_sql(_OWN_ROW, mapping, values=", ".join(values))


def make_table(connection: Connection, like: str, name: str, *, filled: bool) -> int:
    """Create a temporary table with the columns of the host's table `like`, without constraints.

    `filled`: with the host's defaults and computed columns. Sets the search path of the transaction to trueup's, in
    which the triggers resolve names. Returns the oid of the host's table.
    """
    connection.execute(_SET_SEARCH_PATH)
    table_id: int = connection.execute(_TABLE_ID, {"table": quote_table(like)}).scalar_one()
    columns = []
    for row in connection.execute(_COLUMNS, {"id": table_id}):
        column = f"{quote_identifier(row.name)} {row.type}"
        given = None if row.given is None else _DRAWN.sub("CAST(1 AS bigint)", row.given)
        if filled and given is not None and "nextval" not in given:
            column += f" GENERATED ALWAYS AS ({given}) STORED" if row.is_generated else f" DEFAULT {given}"
        columns.append(column)
    run(connection, f"CREATE TEMP TABLE {name} ({', '.join(columns)})")
    return table_id


def run(connection: Connection, statement: str) -> CursorResult[Any]:
    return connection.exec_driver_sql(statement.replace("%", "%%"))


def _sql_problem(error: DBAPIError) -> Problem:
    """Return PostgreSQL's message and the remedy."""
    diagnosis = getattr(error.orig, "diag", None)
    message = re.sub(r"\btrueup_row\.", "{row}.", str(getattr(diagnosis, "message_primary", None) or error.orig))
    if isinstance(error.orig, InsufficientPrivilege) and "temporary" in message:
        return f"it can't be tried ({message})", "GRANT TEMPORARY ON DATABASE to this role."
    if "ambiguous" in message:
        return message, "Name the row's columns as {row}.column."
    if "immutable" in message:
        return (
            "it does not always return the same value for the same row (it is not immutable)",
            "Leave out the current time, session settings such as the time zone, and other tables.",
        )
    if "subquery" in message or "aggregate" in message or "set-returning" in message or "window" in message:
        return "it reads more than its row", "Use only the row's own columns."
    return message, "Correct it in trueup.toml."
