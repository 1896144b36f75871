"""Set a database up: migrations of our own tables, then the functions and triggers for the host's mapping."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

from sqlalchemy import Connection, text

from trueup.accounts.subscriptions import refuse_shared_users
from trueup.database import migrate
from trueup.database.locks import INSTALL_LOCK, STATEMENT_TIMEOUT_SECONDS
from trueup.database.schema import SCHEMA
from trueup.errors import NotInstalledError
from trueup.host.catalog import (
    COMPUTED_REMEDY,
    computed_log_columns,
    demanded_log_columns,
    missing_host_columns,
    missing_host_tables,
    tables_without_triggers,
)
from trueup.host.column_types import mapped_columns, wrong_types
from trueup.host.expressions import expression_problem
from trueup.host.log_ids import log_id_problem
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.partitions import partition_problem
from trueup.host.schema_changes import ATTACHING
from trueup.host.setting_values import quote_literal
from trueup.host.sql import render_file
from trueup.install.example_tables import build_host_metadata
from trueup.install.triggers import KEEP_WATCHED, SAVE_TRIGGERS, is_untouched
from trueup.install.write_probe import row_problem
from trueup.settings.settings import get_settings

# Functions before triggers; each file may use what those before it define. Files of macros alone are not among them.
SQL_FILES = (
    "accounts/grants.sql",
    "accounts/accounts.sql",
    "accounts/windows.sql",
    "usage/deltas.sql",
    "install/fill.sql",
    "install/watching.sql",
    "install/triggers.sql",
    "install/partition_triggers.sql",
    "install/window_triggers.sql",
    "gate/modes.sql",
    "gate/balances.sql",
    "gate/holds.sql",
    "gate/provider_calls.sql",
    "usage/charges.sql",
    "usage/log.sql",
    "accounts/granting.sql",
    "reconcile/corrections.sql",
    "reconcile/shards.sql",
    "reconcile/audit.sql",
    "review/decisions.sql",
    "drift/evidence.sql",
    "install/search_path.sql",
)

_CREATE_SCHEMA = f"CREATE SCHEMA {SCHEMA}"
LOCK_TIMEOUT_SECONDS = 5


def install(connection: Connection, mapping: HostMapping, *, with_host_tables: bool) -> list[str]:
    """Bring the database to this version, in the caller's transaction; safe to repeat. Returns what was done.

    Two installers take turns: one waits for the other up to `STATEMENT_TIMEOUT_SECONDS`. A trigger waits at most
    `LOCK_TIMEOUT_SECONDS` for the usage log, so that the host's writers never queue behind us for longer. Raises
    `NotInstalledError` when the host's tables are not there.
    """
    done = []
    connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'"))
    # Before the short limit: another installer may take longer than that, and the host's writers wait for neither.
    connection.execute(text("SET LOCAL lock_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": INSTALL_LOCK})
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"))
    if with_host_tables:
        build_host_metadata(mapping).create_all(connection)
        done.append("host tables")
    create_tables(connection, mapping)
    done.append("tables")
    values = {"log": quote_table(mapping.usage_log.table), "touched": not is_untouched(connection)}
    connection.execute(_MARK_BALANCES_STALE, _installation_row(mapping) | values)
    drop_functions(connection)
    run_scripts(connection, sql_scripts(mapping))
    done.append("functions and triggers")
    run_scripts(connection, [save_sql(mapping), SAVE_TRIGGERS, KEEP_WATCHED])
    return done


def create_tables(connection: Connection, mapping: HostMapping) -> None:
    """Make or upgrade trueup's tables, without a lock on the host's. Raises `NotInstalledError` for an unfit host."""
    _refuse_other_user_ids(connection, mapping)
    check_host(connection, mapping)
    # Who owns the schema need not have the right to make another.
    if _lacks_schema(connection):
        connection.execute(text(_CREATE_SCHEMA))
    migrate.create_tables(connection, mapping.user_id_type)


def tables_sql(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the statements by which `create_tables` would go on from what is there; none: it is of this version.

    Raises `NotInstalledError` for an unfit host.
    """
    _refuse_other_user_ids(connection, mapping)
    check_host(connection, mapping)
    tables = migrate.create_tables_sql(connection, mapping.user_id_type)
    return [*([f"{_CREATE_SCHEMA};"] if _lacks_schema(connection) else []), *([tables] if tables else [])]


def sql_scripts(mapping: HostMapping, names: Iterable[str] = SQL_FILES) -> list[str]:
    """Return the scripts that make the functions and triggers for this mapping, in order; or these of them."""
    return [render_file(name, mapping) for name in names]


def run_scripts(connection: Connection, scripts: Iterable[str]) -> None:
    for script in scripts:
        connection.exec_driver_sql(script.replace("%", "%%"))


def save_sql(mapping: HostMapping, *, ready: bool = True) -> str:
    """Return the statement that writes down which mapping the database is ready for, or is being made ready for."""
    row = _installation_row(mapping) | ({} if ready else {"fingerprint": ATTACHING})
    return _SAVE_INSTALLATION.format(**{key: quote_literal(value) for key, value in row.items()})


def drop_functions(connection: Connection) -> None:
    """Drop trueup's functions, but those of triggers: until they are made again, every gate refuses."""
    run_scripts(connection, [DROP_FUNCTIONS])


def check_installed(connection: Connection) -> None:
    """Raise `NotInstalledError` unless the database has been set up, and for the settings' mapping."""
    found = connection.execute(text("SELECT to_regclass('trueup.installation') IS NOT NULL"))
    if not found.scalar_one():
        raise NotInstalledError("This database has no trueup schema. Run `trueup db init`.")
    installed = connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation"))
    if installed in (None, ATTACHING):
        raise NotInstalledError(
            "trueup is just being attached to this database, or that was interrupted. Run `trueup db attach`."
        )
    if installed != get_settings().host.fingerprint():
        raise NotInstalledError(
            "This database was set up for other table or column names of the host than [host] in the settings now "
            "says. Set them back, or set the database up for the new ones with `trueup db init`."
        )


# A function whose parameters changed would stay beside its successor. Callers in other transactions keep the old ones
# until this one commits.
DROP_FUNCTIONS = """
DO $$
DECLARE
    f regprocedure;
BEGIN
    FOR f IN SELECT oid FROM pg_proc
             WHERE pronamespace = 'trueup'::regnamespace AND prorettype <> 'trigger'::regtype
    LOOP
        EXECUTE 'DROP FUNCTION ' || f;
    END LOOP;
END $$;
"""

# A trigger that was not there has missed rows, and another mapping sees other rows: then no balance can be trusted, and
# each is rebuilt from the log when next read.
_MARK_BALANCES_STALE = text(
    """
    INSERT INTO trueup.log_truncation (truncated_at)
    SELECT clock_timestamp()
    WHERE EXISTS (SELECT FROM trueup.balance)
      AND (:touched OR NOT EXISTS (SELECT FROM trueup.installation WHERE mapping_fingerprint = :fingerprint)
           OR (SELECT count(*) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
               WHERE g.tgrelid = to_regclass(:log) AND g.tgenabled IN ('O', 'A')
                 AND p.pronamespace = to_regnamespace('trueup')) < 4)
    """
)

_SAVE_INSTALLATION = """
INSERT INTO trueup.installation (mapping_fingerprint, mapping)
VALUES ({fingerprint}, CAST({mapping} AS jsonb))
ON CONFLICT (singleton) DO UPDATE
SET mapping_fingerprint = excluded.mapping_fingerprint, mapping = excluded.mapping;
"""


def _installation_row(mapping: HostMapping) -> dict[str, str]:
    return {"fingerprint": mapping.fingerprint(), "mapping": mapping.model_dump_json()}


def check_host(connection: Connection, mapping: HostMapping) -> None:
    """What a charge would stumble over, after its tokens are spent, is refused here: raises `NotInstalledError`."""
    encoding = connection.scalar(text("SELECT current_setting('server_encoding')"))
    if encoding != "UTF8":
        raise NotInstalledError(
            f"The database's encoding is {encoding}. Nothing was changed. It can't store every answer of a model, so a "
            "charge could fail for its text. Move the host's data to a database created with ENCODING 'UTF8'."
        )
    tables = missing_host_tables(connection, mapping)
    if tables:
        raise NotInstalledError(
            f"The database has no table {', '.join(tables)}. Nothing was changed. Map the host's names under [host] "
            "in trueup.toml, or create example tables with `trueup db init --with-host-tables`."
        )
    columns = missing_host_columns(connection, mapping)
    if columns:
        raise NotInstalledError(
            f"The database has no column {', '.join(columns)}. Nothing was changed. Map the host's names, or what "
            "stands for a missing column, under [host] in trueup.toml."
        )
    wrong = list(wrong_types(mapped_columns(connection, mapping), mapping))
    if wrong:
        raise NotInstalledError(
            f"{' '.join(one.what for one in wrong)} Nothing was changed. "
            f"{' '.join(dict.fromkeys(one.remedy for one in wrong))}"
        )
    demanded = demanded_log_columns(connection, mapping)
    if demanded:
        raise NotInstalledError(
            f"{', '.join(demanded)} must be given in each row of the usage log, and trueup's rows could not give it. "
            "Nothing was changed. Give the column a default in the database."
        )
    computed = computed_log_columns(connection, mapping)
    if computed:
        raise NotInstalledError(
            f"{', '.join(computed)} is computed by the database, and trueup's rows would have to give it. Nothing was "
            f"changed. {COMPUTED_REMEDY}"
        )
    views = tables_without_triggers(connection, mapping)
    if views:
        raise NotInstalledError(
            f"{', '.join(views)} is no table, so that trueup could not be told of its changes. Nothing was changed. "
            "Map the table behind it under [host] in trueup.toml."
        )
    for judge in (log_id_problem, partition_problem, expression_problem, row_problem):
        problem = judge(connection, mapping)
        if problem is not None:
            raise NotInstalledError(f"{problem[0]} Nothing was changed. {problem[1]}")
    refuse_shared_users(connection, mapping)


def _refuse_other_user_ids(connection: Connection, mapping: HostMapping) -> None:
    """Our tables keep the type of user id that they were made for."""
    if connection.scalar(text("SELECT to_regclass('trueup.installation') IS NULL")):
        return
    installed = connection.scalar(text("SELECT mapping->>'user_id_type' FROM trueup.installation"))
    if installed is not None and installed != mapping.user_id_type:
        raise NotInstalledError(
            f"This database was set up for user ids of type {installed}, the settings now say {mapping.user_id_type}. "
            "Nothing was changed. Set host.user_id_type back."
        )


def _lacks_schema(connection: Connection) -> bool:
    return bool(connection.scalar(text("SELECT to_regnamespace(:schema) IS NULL"), {"schema": SCHEMA}))


_FUNCTION = re.compile(r"^CREATE OR REPLACE FUNCTION trueup\.(\w+)\(.*?\bAS \$\$(.*?)\$\$;", re.DOTALL | re.MULTILINE)


def expected_functions(mapping: HostMapping) -> Counter[tuple[str, str]]:
    """Return the functions that the code would make for this mapping: names, and hashes of their bodies."""
    scripts = "\n".join(sql_scripts(mapping))
    return Counter((name, hashlib.md5(body.encode()).hexdigest()) for name, body in _FUNCTION.findall(scripts))  # noqa: S324 - tells versions apart
