"""The checks that ask the database, each on its own, over one connection with short time limits."""

from collections.abc import Callable, Iterable

from sqlalchemy import Connection

from trueup.database.engine import create_trueup_engine, translated_errors
from trueup.database.migrate import newest_revision
from trueup.doctor import host, indexes, installation, invariants, log_ids, schemas, server
from trueup.doctor.findings import Finding, error, run_check, warning
from trueup.errors import OldLayoutError, ServiceUnavailableError, TrueupError
from trueup.settings.settings import Settings

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10

Check = Callable[[Connection, Settings], Iterable[Finding]]

_ALWAYS: tuple[tuple[str, Check], ...] = (
    ("postgres", server.check_server),
    ("durability", server.check_durability),
    ("database_clock", server.check_clock),
    ("mapping", host.check_mapping),
    ("log_index", indexes.check_log_index),
    ("subscription_index", indexes.check_subscription_index),
    ("schema", installation.check_schema),
    ("schemas", schemas.check_schemas),
)
# These look at trueup's own objects.
_INSTALLED: tuple[tuple[str, Check], ...] = (
    ("functions", installation.check_functions),
    ("triggers", installation.check_triggers),
    ("rights", installation.check_rights),
    ("log_ids", log_ids.check_log_ids),
    ("holds", invariants.check_holds),
    ("calls", invariants.check_unresolved),
    ("reconcile", invariants.check_runs),
    ("beat", invariants.check_beat),
    ("books", invariants.check_invariants),
)


def examine_database(settings: Settings) -> list[Finding]:
    """Return what all checks of the database find. A server that does not answer is asked once."""
    limits = {
        "database_connect_timeout_seconds": min(settings.database_connect_timeout_seconds, CONNECT_SECONDS),
        "statement_timeout_seconds": STATEMENT_SECONDS,
    }
    found: list[Finding] = []
    try:
        engine = create_trueup_engine(settings.model_copy(update=limits))
        try:
            with translated_errors(), engine.connect() as connection:
                examine(connection.execution_options(isolation_level="AUTOCOMMIT"), settings, found)
        finally:
            engine.dispose()
    except ServiceUnavailableError as failure:
        remedy = "Start the server, or correct TRUEUP_DATABASE_URL."
        found.append(error("database", f"{failure.service} at {failure.where}: {failure.cause}.", remedy))
    except OldLayoutError as failure:
        found.append(error("schema", failure.what, failure.remedy, version=failure.revision, wanted=newest_revision()))
    except TrueupError as failure:
        found.append(error("database", str(failure), "Correct TRUEUP_DATABASE_URL."))
    return found


def examine(connection: Connection, settings: Settings, found: list[Finding]) -> None:
    """Add what each check finds. The connection is one on which each statement is its own transaction."""
    installed = installation.is_installed(connection)
    for name, check in (*_ALWAYS, *(_INSTALLED if installed else ())):
        if connection.invalidated:
            remedy = "See why the database ended the connection, and look again."
            found.append(warning(name, "Not known: the connection to the database was lost.", remedy))
        else:
            found += run_check(name, lambda check=check: check(connection, settings))  # type: ignore[misc]
