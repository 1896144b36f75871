"""Set a database up: trueup's tables by migration, then the functions and triggers for the host's mapping."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable

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
    mapped_columns,
    missing_host_columns,
    missing_host_tables,
    tables_without_triggers,
    wrong_types,
)
from trueup.host.expressions import Problem, expression_problem
from trueup.host.log_ids import log_id_problem
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.partitions import partition_problem
from trueup.host.questions import open_questions
from trueup.host.schema_changes import ATTACHING, SET_UP
from trueup.host.setting_values import quote_literal
from trueup.host.sql import render_file
from trueup.install.baseline import FILL_BASELINE, SAVE_TRIGGER_BASELINE, are_triggers_unchanged, is_installed
from trueup.install.example_tables import build_host_metadata
from trueup.install.trial_writes import trial_problem
from trueup.install.write_probe import row_problem
from trueup.settings.settings import get_settings

# Functions before triggers; a file may use functions of the files before it. Files with only macros are not listed.
SQL_FILES = (
    "accounts/grants.sql",
    "accounts/accounts.sql",
    "accounts/windows.sql",
    "install/journal.sql",
    "usage/deltas.sql",
    "install/fill.sql",
    "install/baseline.sql",
    "install/triggers.sql",
    "install/partition_triggers.sql",
    "install/window_triggers.sql",
    "gate/modes.sql",
    "gate/balances.sql",
    "usage/log_row.sql",
    "gate/owed_charges.sql",
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
    "drift/journal.sql",
    "install/search_path.sql",
)

_CREATE_SCHEMA = f"CREATE SCHEMA {SCHEMA}"
LOCK_TIMEOUT_SECONDS = 5


def install(connection: Connection, mapping: HostMapping, *, with_host_tables: bool) -> list[str]:
    """Bring the database to this version, in the caller's transaction; safe to repeat. Returns the steps done.

    An advisory lock serializes installers; one waits for another up to `STATEMENT_TIMEOUT_SECONDS`. CREATE TRIGGER
    waits at most `LOCK_TIMEOUT_SECONDS` for the usage log, so the host's writers never queue behind it for longer.
    `with_host_tables`: also create example tables for the host. Raises `NotInstalledError` for an unfit host.
    """
    done = []
    connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'"))
    # Without the short limit: another installer may take longer, and no writer of the host waits for this lock.
    connection.execute(text("SET LOCAL lock_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": INSTALL_LOCK})
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"))
    if with_host_tables:
        build_host_metadata(mapping).create_all(connection)
        done.append("host tables")
    create_tables(connection, mapping)
    done.append("tables")
    values = {"log": quote_table(mapping.usage_log.table), "changed": not are_triggers_unchanged(connection)}
    connection.execute(_MARK_BALANCES_STALE, _installation_row(mapping) | values)
    drop_functions(connection)
    run_scripts(connection, sql_scripts(mapping))
    done.append("functions and triggers")
    run_scripts(connection, [save_sql(mapping), SAVE_TRIGGER_BASELINE, FILL_BASELINE])
    return done


def create_tables(connection: Connection, mapping: HostMapping) -> None:
    """Create or upgrade trueup's tables, after a trial write on the host's, which is rolled back.

    Raises `NotInstalledError` for an unfit host.
    """
    _refuse_other_user_ids(connection, mapping)
    check_host(connection, mapping)
    # Not CREATE SCHEMA IF NOT EXISTS: the schema's owner may lack the right to create schemas.
    if _lacks_schema(connection):
        connection.execute(text(_CREATE_SCHEMA))
    migrate.create_tables(connection, mapping.user_id_type)


def tables_sql(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the statements that `create_tables` would run; none: the tables are of this version already.

    Raises `NotInstalledError` for an unfit host.
    """
    _refuse_other_user_ids(connection, mapping)
    check_host(connection, mapping)
    tables = migrate.create_tables_sql(connection, mapping.user_id_type)
    return [*([f"{_CREATE_SCHEMA};"] if _lacks_schema(connection) else []), *([tables] if tables else [])]


def sql_scripts(mapping: HostMapping, names: Iterable[str] = SQL_FILES) -> list[str]:
    """Return the scripts that create the functions and triggers for this mapping, in order; `names`: only these."""
    return [render_file(name, mapping) for name in names]


def run_scripts(connection: Connection, scripts: Iterable[str]) -> None:
    for script in scripts:
        connection.exec_driver_sql(script.replace("%", "%%"))


def save_sql(mapping: HostMapping, *, ready: bool = True) -> str:
    """Return the statement that records the mapping. `ready` False: the database is not ready for it yet."""
    row = _installation_row(mapping) | ({} if ready else {"fingerprint": ATTACHING})
    return _SAVE_INSTALLATION.format(**{key: quote_literal(value) for key, value in row.items()})


def drop_functions(connection: Connection) -> None:
    """Drop trueup's functions except the triggers'. The gate refuses every task until they are created again."""
    run_scripts(connection, [DROP_FUNCTIONS])


def check_installed(connection: Connection) -> None:
    """Raise `NotInstalledError` unless the database is ready for the mapping in the settings."""
    if not is_installed(connection):
        raise NotInstalledError(f"This database has no trueup schema. {SET_UP}")
    installed = connection.scalar(text("SELECT mapping_fingerprint FROM trueup.installation"))
    if installed in (None, ATTACHING):
        raise NotInstalledError(
            "Attaching trueup to this database is in progress, or was interrupted. Run `trueup db attach` to finish it."
        )
    if installed != get_settings().host.fingerprint():
        raise NotInstalledError(
            "This database was set up for other table or column names of the host than [host] in the settings says "
            "now. Restore the old names, or run `trueup db init` to set the database up for the new ones."
        )


# CREATE OR REPLACE alone would keep the old function if its parameters changed. Other transactions call the old
# functions until this one commits.
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

# A missing trigger has missed rows, and another mapping counts other rows. Every balance is stale then; the gate
# rebuilds it from the log when it next reads it.
_MARK_BALANCES_STALE = text(
    """
    INSERT INTO trueup.log_truncation (truncated_at)
    SELECT clock_timestamp()
    WHERE EXISTS (SELECT FROM trueup.balance)
      AND (:changed OR NOT EXISTS (SELECT FROM trueup.installation WHERE mapping_fingerprint = :fingerprint)
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


Judge = Callable[[Connection, HostMapping], Problem | None]


def _named(find: Callable[[Connection, HostMapping], list[str]], what: str, remedy: str) -> Judge:
    """Return a check that fails if `find` returns names; `what` has {} for them."""

    def judge(connection: Connection, mapping: HostMapping) -> Problem | None:
        names = find(connection, mapping)
        return (what.format(", ".join(names)), remedy) if names else None

    return judge


def _type_problem(connection: Connection, mapping: HostMapping) -> Problem | None:
    wrong = list(wrong_types(mapped_columns(connection, mapping), mapping))
    if not wrong:
        return None
    return " ".join(one.what for one in wrong), " ".join(dict.fromkeys(one.remedy for one in wrong))


def _question(connection: Connection, mapping: HostMapping) -> Problem | None:
    """Return the first question about the host whose present answer would change counters to wrong values."""
    for question in open_questions(connection, mapping):
        if question.is_blocking:
            return f"{question.what}.", f"In trueup.toml, {question.remedy} ({question.setting})."
    return None


# In this order: later checks read the tables and columns that earlier ones have found.
_HOST_CHECKS: tuple[Judge, ...] = (
    _named(
        missing_host_tables,
        "The database has no table {}.",
        "Map the host's names under [host] in trueup.toml, or create example tables with "
        "`trueup db init --with-host-tables`.",
    ),
    _named(
        missing_host_columns,
        "The database has no column {}.",
        "Map the host's names, or substitutes for missing columns, under [host] in trueup.toml.",
    ),
    _type_problem,
    _named(
        demanded_log_columns,
        "Each row of the usage log must have a value in {}, and trueup's rows have none.",
        "Give the column a default in the database.",
    ),
    _named(computed_log_columns, "{} is computed by the database, so trueup's rows can't set it.", COMPUTED_REMEDY),
    _named(
        tables_without_triggers,
        "{} is no table, so trueup can't put triggers on it.",
        "Map the table behind it under [host] in trueup.toml.",
    ),
    log_id_problem,
    partition_problem,
    expression_problem,
    row_problem,
    trial_problem,
    _question,
)


def check_host(connection: Connection, mapping: HostMapping) -> None:
    """Raise `NotInstalledError` if a charge would fail on the host's tables: its tokens would be spent by then."""
    for judge in _HOST_CHECKS:
        problem = judge(connection, mapping)
        if problem is not None:
            raise NotInstalledError(f"{problem[0]} Nothing was changed. {problem[1]}")
    refuse_shared_users(connection, mapping)


def _refuse_other_user_ids(connection: Connection, mapping: HostMapping) -> None:
    """Raise `NotInstalledError` if trueup's tables were created for another type of user id: it can't be changed."""
    if not is_installed(connection):
        return
    installed = connection.scalar(text("SELECT mapping->>'user_id_type' FROM trueup.installation"))
    if installed is not None and installed != mapping.user_id_type:
        raise NotInstalledError(
            f"This database was set up for user ids of type {installed}, and the settings say {mapping.user_id_type}. "
            f"Nothing was changed. Set host.user_id_type to {installed} again."
        )


def _lacks_schema(connection: Connection) -> bool:
    return bool(connection.scalar(text("SELECT to_regnamespace(:schema) IS NULL"), {"schema": SCHEMA}))


_FUNCTION = re.compile(r"^CREATE OR REPLACE FUNCTION trueup\.(\w+)\(.*?\bAS \$\$(.*?)\$\$;", re.DOTALL | re.MULTILINE)


def expected_functions(mapping: HostMapping) -> Counter[tuple[str, str]]:
    """Return the functions that this version creates for the mapping: pairs of name and MD5 of the body."""
    scripts = "\n".join(sql_scripts(mapping))
    return Counter((name, hashlib.md5(body.encode()).hexdigest()) for name, body in _FUNCTION.findall(scripts))  # noqa: S324 - tells versions apart
