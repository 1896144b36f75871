"""`trueup db attach` as one script for psql, for a person who reads what is run before it is."""

from collections.abc import Sequence

from sqlalchemy import Connection

from trueup.database.locks import INSTALL_LOCK, LOCK_TIMEOUT_MILLISECONDS, STATEMENT_TIMEOUT_SECONDS
from trueup.database.session import SEARCH_PATH
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_sql
from trueup.install.attach import (
    MISMATCHES,
    SAMPLE_USERS,
    TRIGGER_STEPS,
    batch_users,
    is_ready,
    opening_scripts,
    prepare_scripts,
)
from trueup.install.install import tables_sql

_HEAD = """\
-- What `trueup db attach` runs in this database, in psql: it stops at the first error, and may be run again.
-- Run it as the role that is to own schema trueup. Each step is a transaction of its own, and waits at most
-- {milliseconds} ms for a lock on a table of the host's: should one be in use, run the script again.
\\set ON_ERROR_STOP on
SET search_path = {search_path};  -- no function or operator of another role is called
SET timezone = 'UTC';  -- of times without a zone
SET row_security = off;  -- an error rather than sums over the rows that a policy leaves
"""

_BEGIN = f"""\
BEGIN;
SET LOCAL lock_timeout = '{LOCK_TIMEOUT_MILLISECONDS}ms';
SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s';
SELECT pg_advisory_xact_lock({INSTALL_LOCK});
"""

_FILL = """\
SET lock_timeout = '{milliseconds}ms';
SET statement_timeout = 0;
DO $$
DECLARE
    v_last {user_id_type};
BEGIN
    LOOP
        PERFORM pg_advisory_xact_lock({lock});
        SELECT f.last INTO v_last FROM trueup.fill_balances(v_last, {users}) f;
        COMMIT;
        EXIT WHEN v_last IS NULL;
    END LOOP;
END $$;
"""

_COMPARE = """\
DO $$
BEGIN
    IF EXISTS ({mismatches}) THEN
        RAISE EXCEPTION 'balances do not agree with the log: the gate stays closed';
    END IF;
END $$;
"""

_CHECK_TRIGGERS = "SELECT trueup.require_watched();\n"


def attach_script(connection: Connection, mapping: HostMapping) -> str:
    """Return what `attach` would run as the database is now. Raises `NotInstalledError` for an unfit host."""
    tables = tables_sql(connection, mapping)
    ready = is_ready(connection, mapping)
    parts = [
        _HEAD.format(milliseconds=LOCK_TIMEOUT_MILLISECONDS, search_path=SEARCH_PATH),
        _step("1. Schema, tables and functions of trueup", [*tables, *prepare_scripts(mapping, ready=ready)]),
    ]
    for step in TRIGGER_STEPS:
        if step.is_needed(connection, mapping):
            parts.append(_step(step.title, step.scripts(mapping)))
    users = batch_users(connection, mapping)
    filling = _FILL.format(
        milliseconds=LOCK_TIMEOUT_MILLISECONDS, lock=INSTALL_LOCK, users=users, user_id_type=mapping.user_id_type
    )
    parts.append(f"-- 3. Balances, from the log, in batches that are committed one by one\n{filling}")
    mismatches = render_sql(MISMATCHES, mapping).replace(":users", str(SAMPLE_USERS)).strip()
    opening = [_COMPARE.format(mismatches=mismatches), *opening_scripts(mapping, _CHECK_TRIGGERS)]
    parts.append(_step("4. If they agree with the log: the functions of the gate, and the mark", opening))
    return "\n".join(parts)


def _step(title: str, scripts: Sequence[str]) -> str:
    body = "\n".join(script.strip("\n") for script in scripts)
    return f"-- {title}\n{_BEGIN}\n{body}\nCOMMIT;\n"
