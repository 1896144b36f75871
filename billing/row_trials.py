"""Would the host's log take trueup's rows? One of each section is written into a table of our own like it, rolled back.

What the log refuses is refused when its tokens are spent already. So its types, its lengths, its checks and its keys
to other tables are looked at before.
"""

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from billing.host_trials import HOST_TABLE, SEARCH_PATH, SET_SEARCH_PATH, Problem, make_table, own_row, run
from billing.host_values import quote_identifier
from billing.mapping import HostMapping, quote_table
from billing.sections import SECTIONS

_MAY_MAKE = text("SELECT has_database_privilege(current_database(), 'TEMPORARY')")
_CHECKS = text(
    "SELECT CAST(conname AS text) AS name, pg_get_constraintdef(oid) AS definition FROM pg_constraint "
    "WHERE conrelid = CAST(:id AS oid) AND contype = 'c' ORDER BY conname"
)
# But those to the user: whoever is gone by then has nothing that could be logged.
_KEYS = text(
    """
    SELECT CAST(CAST(k.confrelid AS regclass) AS text) AS leads_to, k.columns, k.other_columns
    FROM (
        SELECT c.confrelid,
               ARRAY(SELECT CAST(a.attname AS text) FROM unnest(c.conkey) WITH ORDINALITY AS n (number, place)
                     JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = n.number ORDER BY n.place)
               AS columns,
               ARRAY(SELECT CAST(a.attname AS text) FROM unnest(c.confkey) WITH ORDINALITY AS n (number, place)
                     JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = n.number ORDER BY n.place)
               AS other_columns
        FROM pg_constraint c WHERE c.conrelid = to_regclass(:table) AND c.contype = 'f'
    ) k
    WHERE k.columns && CAST(:written AS text[]) AND NOT CAST(:user_id AS text) = ANY (k.columns)
    ORDER BY 1
    """
)
_REMEDIES = {
    "23514": "Let the constraint allow it.",  # check violation
    "22001": "Make the column longer, or map another one.",  # string data right truncation
}
_REMEDY = (
    "Map columns that take any text and whole numbers, or {value = …} for those that the host's own default is to fill."
)


def row_problem(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return why the log would refuse rows of trueup's, and the remedy; None: it takes them, as far as can be tried.

    In the caller's transaction, of which nothing is left. A role without the right to make temporary tables tries none.
    """
    return _refused_row(connection, mapping) or _unknown_key(connection, mapping)


def _refused_row(connection: Connection, mapping: HostMapping) -> Problem | None:
    if not connection.scalar(_MAY_MAKE):
        return None
    log = mapping.usage_log.table
    host = connection.execute(HOST_TABLE, {"table": quote_table(log)}).one()
    trial = connection.begin_nested()
    section = ""
    try:
        connection.execute(SET_SEARCH_PATH, {"path": SEARCH_PATH})
        make_table(connection, host.id, "trueup_own", filled=True)
        for check in connection.execute(_CHECKS, {"id": host.id}).all():
            name = quote_identifier(check.name)
            run(connection, f"ALTER TABLE pg_temp.trueup_own ADD CONSTRAINT {name} {check.definition}")
        connection.execute(SET_SEARCH_PATH, {"path": host.search_path})
        for section in sorted(SECTIONS):
            run(connection, own_row(mapping, succeeded=True, section=section))
    except DBAPIError as error:
        if not section:
            return None  # a table like it can't be made: then there is nothing to try
        diagnosis = getattr(error.orig, "diag", None)
        said = getattr(diagnosis, "message_primary", None) or str(error.orig)
        remedy = _REMEDIES.get(str(getattr(error.orig, "sqlstate", None)), _REMEDY)
        return f"host.usage_log: {log} would refuse trueup's row of section {section!r} ({said}).", remedy
    finally:
        trial.rollback()
    return None


def _unknown_key(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Values that must stand in another table of the host's, which does not have them all, or not for sure."""
    log = mapping.usage_log
    values = {"table": quote_table(log.table), "written": log.written, "user_id": log.user_id}
    for key in connection.execute(_KEYS, values).all():
        what = (
            f"host.usage_log: what trueup writes into {log.table}.{', '.join(key.columns)} must stand in {key.leads_to}"
        )
        if key.columns != [log.section]:
            return f"{what}, and may not.", "Drop that foreign key, or map {value = …} in place of the column."
        column = quote_identifier(key.other_columns[0])
        there = set(run(connection, f"SELECT CAST({column} AS text) FROM {key.leads_to}").scalars())
        missing = sorted(SECTIONS - there)
        if missing:
            return f"{what}, where there is no {', '.join(missing)}.", "Add them there, or drop that foreign key."
    return None
