"""The checks of the database server, and the run of all checks over one connection with short time limits."""

from collections.abc import Callable, Iterable, Iterator

from sqlalchemy import Connection, text

from trueup.database.engine import create_trueup_engine, translated_errors
from trueup.database.migrate import newest_revision
from trueup.doctor import host, installation, invariants, schemas
from trueup.doctor.clocks import judge, measure
from trueup.doctor.findings import Finding, error, ok, run_check, warning
from trueup.errors import OldLayoutError, ServiceUnavailableError, TrueupError
from trueup.settings.settings import Settings

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10
OLDEST_SERVER = 140_000

Check = Callable[[Connection, Settings], Iterable[Finding]]


def check_server(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check the server's version, and that it accepts writes."""
    statement = text(
        "SELECT current_setting('server_version') AS version, "
        "CAST(current_setting('server_version_num') AS int) AS number, pg_is_in_recovery() AS standby, "
        "current_setting('default_transaction_read_only') AS read_only"
    )
    row = connection.execute(statement).one()
    if row.number < OLDEST_SERVER:
        yield error("postgres", f"PostgreSQL {row.version}.", "Use PostgreSQL 14 or newer.", version=row.version)
    else:
        yield ok("postgres", f"PostgreSQL {row.version}.", version=row.version)
    if row.standby:
        remedy = "Set TRUEUP_DATABASE_URL to the primary."
        yield error("postgres", "This server is a standby and accepts no writes.", remedy)
    if row.read_only == "on":
        remedy = "Use the worker's role, or run ALTER ROLE … RESET default_transaction_read_only."
        yield error("postgres", "Transactions of this role are read-only.", remedy)


def check_durability(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield the server settings with which a crash may lose a committed charge."""
    names = ("fsync", "full_page_writes", "synchronous_commit")
    off = [name for name in names if connection.scalar(text(f"SHOW {name}")) == "off"]
    for name in off:
        if name != "synchronous_commit":
            what = f"{name} is off: a crash may corrupt the database."
            yield error("durability", what, f"Set {name} = on, and restart the server.")
    if "synchronous_commit" in off:
        what = "synchronous_commit is off: a crash loses the last charges."
        yield warning("durability", what, "Set synchronous_commit = on, at least for trueup's role.")
    elif not off:
        yield ok("durability", "Committed charges survive a crash.")
    yield from _check_standbys(connection)
    yield from _check_temporary_files(connection)


def _check_standbys(connection: Connection) -> Iterator[Finding]:
    """Yield a warning if a failover may lose committed holds. Their tokens could be spent again."""
    row = connection.execute(
        text(
            "SELECT count(*) AS standbys, current_setting('synchronous_standby_names') AS synchronous "
            "FROM pg_stat_replication r WHERE r.application_name <> 'pg_basebackup' AND NOT EXISTS ("
            "SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')"
        )
    ).one()
    if row.standbys and not row.synchronous:
        yield warning(
            "durability",
            f"{row.standbys} standbys follow this server, and none is synchronous: a failover loses the last holds and "
            "charges, and their tokens can be spent again.",
            "Set synchronous_standby_names, so that a commit waits for a standby.",
            standbys=row.standbys,
        )


# What is set for one database or one role, which need not be this session's.
_TEMPORARY_FILES = text(
    """
    SELECT DISTINCT setting FROM (
        SELECT 'temp_file_limit=' || current_setting('temp_file_limit') AS setting
        UNION ALL SELECT unnest(s.setconfig) FROM pg_db_role_setting s
    ) s WHERE s.setting LIKE 'temp_file_limit=%' AND s.setting <> 'temp_file_limit=-1' ORDER BY 1
    """
)


def _check_temporary_files(connection: Connection) -> Iterator[Finding]:
    """Yield a warning if large statements of the host on its log may fail by a limit on temporary files."""
    limits = list(connection.scalars(_TEMPORARY_FILES))
    if limits:
        yield warning(
            "durability",
            f"{', '.join(limits)}: a statement of the host that writes so many bytes of log rows at once fails, "
            "because trueup's triggers see its rows in a temporary table.",
            "Raise the limit for the roles that load or change the log in bulk, or let them write fewer rows at once.",
            limits=limits,
        )


def check_clock(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Compare the database's clock, which trueup uses, with this machine's."""
    statement = text("SELECT extract(epoch FROM clock_timestamp())")
    offset = measure(lambda: float(connection.execute(statement).scalar_one()))
    yield from judge("database_clock", "The database's clock and this machine's", offset)


_ALWAYS: tuple[tuple[str, Check], ...] = (
    ("postgres", check_server),
    ("durability", check_durability),
    ("database_clock", check_clock),
    ("mapping", host.check_mapping),
    ("log_index", host.check_log_index),
    ("subscription_index", host.check_subscription_index),
    ("schema", installation.check_schema),
    ("schemas", schemas.check_schemas),
)
# These checks need trueup's own objects.
_INSTALLED: tuple[tuple[str, Check], ...] = (
    ("functions", installation.check_functions),
    ("triggers", installation.check_triggers),
    ("rights", installation.check_rights),
    ("log_ids", host.check_log_ids),
    ("holds", invariants.check_holds),
    ("calls", invariants.check_unresolved),
    ("owed_charges", invariants.check_owed_charges),
    ("charge_events", invariants.check_charge_events),
    ("reconcile", invariants.check_runs),
    ("beat", invariants.check_beat),
    ("books", invariants.check_invariants),
)


def examine_database(settings: Settings) -> list[Finding]:
    """Return the findings of all database checks. A server that does not answer is one finding."""
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
    """Add the findings of each check to `found`. The connection must be in autocommit mode."""
    installed = installation.is_installed(connection)
    for name, check in (*_ALWAYS, *(_INSTALLED if installed else ())):
        if connection.invalidated:
            remedy = "Find out why the database ended the connection, and run doctor again."
            found.append(warning(name, "Unknown: the connection to the database was lost.", remedy))
        else:
            found += run_check(name, lambda check=check: check(connection, settings))  # type: ignore[misc]
