"""Do the host's real tables take trueup's writes? A log row and a lowered counter are written, and rolled back.

`write_probe` tries a copy of the log, which has none of its triggers. This tries the triggers and constraints that a
charge meets. A role without the right to write them tries nothing: workers then write by another role.
"""

from typing import Any

from psycopg.errors import CheckViolation, ForeignKeyViolation, InsufficientPrivilege
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.database.driver_errors import is_transient, reason_of
from trueup.host.expressions import Problem
from trueup.host.fields import SECTIONS
from trueup.host.mapping import HostMapping
from trueup.host.sections import usable_sections
from trueup.host.sql import render_statement

# The host's writers must not wait for a trial, nor the trial for them.
_SHORT_WAIT = text("SET LOCAL lock_timeout = '50ms'")
_OWN_PATH = text("SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)")
_CHECK_NOW = text("SET CONSTRAINTS ALL IMMEDIATE")
_LOG_ROW = """
    {% from "host/search_path.sql" import role_search_path %}
    INSERT INTO {{ usage_log }} AS l ({{ usage_log.written() }})
    OVERRIDING SYSTEM VALUE
    SELECT {{ usage_log.written("r") }}
    FROM (SELECT CAST({% if usage_log_id_type == "bigint" %}nextval(pg_get_serial_sequence(
                         {{ usage_log | literal }}, (parse_ident({{ usage_log.id | literal }}))[1]))
                      {%- else %}gen_random_uuid(){% endif %} AS {{ usage_log_id_type }}) AS id,
                 s.{{ subscription.user_id }} AS user_id, CAST(:section AS text) AS section,
                 CAST(1 AS bigint) AS prompt_tokens, CAST(1 AS bigint) AS completion_tokens,
                 CAST(2 AS bigint) AS total_tokens, CAST(1 AS bigint) AS response_time_ms, true AS success,
                 'o3' AS model_name, CAST('{"task_id": "1"}' AS jsonb) AS metadata, clock_timestamp() AS created_at
          FROM {{ subscription }} s
          WHERE s.{{ subscription.user_id }} {{ "= :user" if of_one_user else "IS NOT NULL" }} LIMIT 1) r
    CROSS JOIN {{ role_search_path() }}
    RETURNING 1
"""
_LOWER = """
    {% from "host/search_path.sql" import role_search_path %}
    {% from "host/rows.sql" import can_be_lowered, lowered_counter %}
    UPDATE {{ subscription }} s SET {{ subscription.tokens_remaining }} = {{ lowered_counter("s", 1) }}
    FROM {{ role_search_path() }}
    WHERE s.{{ subscription.id }} = (
        SELECT f.{{ subscription.id }} FROM {{ subscription }} f WHERE {{ can_be_lowered("f") }}
        LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING 1
"""
# The lock keeps the host from changing the counter between the two reads.
_LOCK_COUNTER = """
    {% from "host/rows.sql" import can_be_lowered %}
    SELECT f.{{ subscription.user_id }} AS user_id, f.{{ subscription.tokens_remaining }} AS counter
    FROM {{ subscription }} f WHERE {{ can_be_lowered("f") }} AND f.{{ subscription.user_id }} IS NOT NULL
    LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
"""
_COUNTER = """
    SELECT s.{{ subscription.tokens_remaining }} FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = :user
"""
_ANY = """
    SELECT EXISTS (SELECT FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} IS NOT NULL)
"""
_REMEDY = (
    "Let the constraint or the trigger of the table allow it; a setting that a trigger reads can be given to trueup's "
    "role: ALTER ROLE … SET …."
)


def trial_problem(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return what of the host's refuses trueup's writes, and the remedy; None: nothing, or it could not be tried.

    In the caller's transaction, of which nothing is left but a gap in the sequence of the log's ids. Without a
    subscription there is no user to try a row with.
    """
    if not connection.scalar(render_statement(_ANY, mapping)):
        return None
    log, names = mapping.usage_log.table, mapping.subscription
    if mapping.usage_log.record != "host":
        row = render_statement(_LOG_ROW, mapping, of_one_user=False)
        refusal = _refusal(connection, row, must_write=True, section=_section(connection, mapping))
        if refusal is not None:
            return (
                f"host.usage_log: {log} refuses a row of trueup's ({refusal}). Its tokens would be owed.",
                _REMEDY,
            )
        problem = _counter_problem(connection, mapping)
        if problem is not None:
            return problem
    refusal = _refusal(connection, render_statement(_LOWER, mapping), must_write=False)
    if refusal is not None:
        return (
            f"host.subscription: {names.table} refuses that trueup lowers {names.tokens_remaining} ({refusal}).",
            _REMEDY,
        )
    return None


def _section(connection: Connection, mapping: HostMapping) -> str:
    """Return a section that the log takes, if one is known."""
    return next(iter(usable_sections(connection, mapping)), min(SECTIONS))


def _counter_problem(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return the problem of a host that lowers the counter itself for each log row, if the mapping does not say so."""
    names, log = mapping.subscription, mapping.usage_log.table
    moved = _moved_counter(connection, mapping) if names.counter_kept_by is None else None
    if moved is None:
        return None
    what = (
        f"host.subscription: {names.table}.{names.tokens_remaining} went from {moved[0]} to {moved[1]} when a row of 2 "
        f"tokens was written to {log}: a trigger of the host's keeps the counter. trueup would subtract each call too."
    )
    remedy = (
        'Set counter_kept_by = "host" under [host.subscription]: trueup then leaves the decrement to the trigger. Or '
        'set it to "trueup" if the trigger does not fire for the workers\' role.'
    )
    return what, remedy


def _moved_counter(connection: Connection, mapping: HostMapping) -> tuple[int, int] | None:
    """Return a counter before and after a log row of its user; None: it did not change, or this could not be tried."""
    trial = connection.begin_nested()
    try:
        connection.execute(_SHORT_WAIT)
        locked = connection.execute(render_statement(_LOCK_COUNTER, mapping)).one_or_none()
        if locked is None:
            return None
        row = render_statement(_LOG_ROW, mapping, of_one_user=True)
        connection.execute(row, {"section": _section(connection, mapping), "user": locked.user_id})
        connection.execute(_CHECK_NOW)
        connection.execute(_OWN_PATH)  # the row's triggers ran in the role's
        after = connection.scalar(render_statement(_COUNTER, mapping), {"user": locked.user_id})
        return (locked.counter, after) if after != locked.counter else None
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return None
    finally:
        trial.rollback()


def _refusal(connection: Connection, statement: Any, *, must_write: bool, **values: Any) -> str | None:
    """Return why the statement was refused, in PostgreSQL's words. `must_write`: also if it wrote no row."""
    trial = connection.begin_nested()
    try:
        connection.execute(_SHORT_WAIT)
        written = connection.execute(statement, values).all()
        connection.execute(_CHECK_NOW)
        return "a trigger drops it" if must_write and not written else None
    except DBAPIError as error:
        # The user may have been deleted meanwhile. A transient error is no refusal.
        if is_transient(error) or isinstance(error.orig, InsufficientPrivilege | ForeignKeyViolation):
            return None
        # A row of now without a partition names no constraint: the host may create the partition when it is needed.
        if isinstance(error.orig, CheckViolation) and not error.orig.diag.constraint_name:
            return None
        return reason_of(error)
    finally:
        trial.rollback()
