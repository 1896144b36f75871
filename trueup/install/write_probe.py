"""Try trueup's rows before a charge needs them: insert some into a temporary copy of the host's log.

A row that the log refuses later is a row whose tokens are spent already. So the probe tests the log's types, lengths,
checks and foreign keys now, and rolls everything back.
"""

from typing import Any

from psycopg.errors import CheckViolation, InsufficientPrivilege, NumericValueOutOfRange, StringDataRightTruncation
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.database.driver_errors import is_transient
from trueup.host.expressions import Problem, make_table, own_row, run
from trueup.host.fields import SECTIONS
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.sections import usable_sections
from trueup.host.setting_values import quote_identifier

_MAY_MAKE = text("SELECT has_database_privilege(current_database(), 'TEMPORARY')")
_CHECKS = text(
    "SELECT CAST(conname AS text) AS name, pg_get_constraintdef(oid) AS definition FROM pg_constraint "
    "WHERE conrelid = CAST(:id AS oid) AND contype = 'c' ORDER BY conname"
)
# Without foreign keys to the user: a deleted user makes no calls.
_KEYS = text(
    """
    SELECT CAST(CAST(k.confrelid AS regclass) AS text) AS leads_to, k.columns, k.other_columns, k.readable
    FROM (
        SELECT c.confrelid,
               has_column_privilege(c.confrelid, c.confkey[1], 'SELECT') AND NOT row_security_active(c.confrelid)
                   AND (SELECT has_schema_privilege(o.relnamespace, 'USAGE') FROM pg_class o WHERE o.oid = c.confrelid)
               AS readable,
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
_REMEDIES: dict[type, str] = {
    CheckViolation: "Let the constraint allow it.",
    StringDataRightTruncation: "Make the column longer, or map another one.",
    NumericValueOutOfRange: "Make the column integer or bigint, or map another one.",
    InsufficientPrivilege: "Grant that to trueup's roles, including this one.",
}
# Tokens of each kind, and milliseconds, of a large call.
_MANY = 600_000
_LONG_NAME = "claude-3-5-sonnet-20241022"
_REMEDY = (
    "Map columns that accept any text and any integer, or {value = …} where the column's own default should apply. "
    'If the section is an enum, name it: section_type = "SCHEMA.TYPE".'
)


def row_problem(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return why the log would refuse trueup's rows, and the remedy; None: no refusal was found.

    Runs in the caller's transaction and rolls its own work back. Without the right to create temporary tables it only
    checks foreign keys.
    """
    if mapping.usage_log.record == "host":
        return None
    return _refused_row(connection, mapping) or _unknown_key(connection, mapping)


def _refused_row(connection: Connection, mapping: HostMapping) -> Problem | None:
    if not connection.scalar(_MAY_MAKE):
        return None
    log = mapping.usage_log.table
    trial = connection.begin_nested()
    made = False
    try:
        table_id = make_table(connection, log, "trueup_own", filled=True)
        for check in connection.execute(_CHECKS, {"id": table_id}).all():
            name = quote_identifier(check.name)
            run(connection, f"ALTER TABLE pg_temp.trueup_own ADD CONSTRAINT {name} {check.definition}")
        made = True
        return _refused(connection, mapping)
    except DBAPIError as error:
        if made or is_transient(error):
            raise
        return None  # the copy can't be created, so there is nothing to try rows on
    finally:
        trial.rollback()


def _refused(connection: Connection, mapping: HostMapping) -> Problem | None:
    log = mapping.usage_log.table
    # Without a section that is known to fit, the row of any section shows why.
    section = next(iter(usable_sections(connection, mapping)), min(SECTIONS))
    refusal = _refusal(connection, mapping, section=section)
    if refusal is not None:
        return _problem(f"{log} would refuse trueup's row of section {section!r}", refusal)
    # Only these kinds of errors: a host may limit figures by a check, and trueup cuts a name that is too long.
    for described, kind, row in (
        (f"of {2 * _MANY:,} tokens and {_MANY:,} ms", NumericValueOutOfRange, {"size": _MANY}),
        (f"of model {_LONG_NAME!r}", CheckViolation, {"model": _LONG_NAME}),
    ):
        refusal = _refusal(connection, mapping, section=section, **row)
        if refusal is not None and isinstance(refusal.orig, kind):
            return _problem(f"{log} would refuse trueup's row {described}", refusal)
    return None


def _refusal(connection: Connection, mapping: HostMapping, **row: Any) -> DBAPIError | None:
    """Return the error of inserting this row; None: it fits.

    A valid user id is unknown here, so the row is tried with a made-up user and without one. It fits if one try works.
    """
    refusals = []
    for user in (True, False):
        attempt = connection.begin_nested()
        try:
            run(connection, own_row(mapping, succeeded=True, user=user, **row))
            return None
        except DBAPIError as error:
            if is_transient(error):
                raise
            refusals.append(error)
        finally:
            attempt.rollback()
    return refusals[0]


def _problem(refused: str, refusal: DBAPIError) -> Problem:
    message = getattr(getattr(refusal.orig, "diag", None), "message_primary", None) or str(refusal.orig)
    return f"host.usage_log: {refused} ({message}).", _REMEDIES.get(type(refusal.orig), _REMEDY)


def _unknown_key(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return the problem of a foreign key from a column that trueup writes, if its table may lack trueup's values."""
    log = mapping.usage_log
    values = {"table": quote_table(log.table), "written": log.written, "user_id": log.user_id}
    for key in connection.execute(_KEYS, values).all():
        fault = f"host.usage_log: {log.table}.{', '.join(key.columns)} has a foreign key to {key.leads_to}"
        if key.columns != [log.section]:
            return (
                f"{fault}, which may lack the values that trueup writes.",
                "Drop that foreign key, or map {value = …} in place of the column.",
            )
        if not key.readable:
            continue  # PostgreSQL checks a key as the table's owner; a role that may read it finds the problem
        column = quote_identifier(key.other_columns[0])
        if not run(connection, f"SELECT EXISTS (SELECT {column} FROM {key.leads_to})").scalar():
            return f"{fault}, which has no rows.", "Add the sections of your tasks there, or drop that foreign key."
    return None
