"""The database server: version, clock, and whether what it has committed survives a crash."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from trueup.doctor.clocks import judge, measure
from trueup.doctor.findings import Finding, error, ok, warning
from trueup.settings.settings import Settings

OLDEST_SERVER = 140_000


def check_server(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield the server's version, and whether it takes writes."""
    row = connection.execute(
        text(
            "SELECT current_setting('server_version') AS version, "
            "CAST(current_setting('server_version_num') AS int) AS number, pg_is_in_recovery() AS standby, "
            "current_setting('default_transaction_read_only') AS read_only"
        )
    ).one()
    if row.number < OLDEST_SERVER:
        yield error("postgres", f"PostgreSQL {row.version}.", "Use PostgreSQL 14 or newer.", version=row.version)
    else:
        yield ok("postgres", f"PostgreSQL {row.version}.", version=row.version)
    if row.standby:
        yield error(
            "postgres", "This server is a standby and takes no writes.", "Point TRUEUP_DATABASE_URL to the primary."
        )
    if row.read_only == "on":
        yield error(
            "postgres",
            "Transactions of this role are read-only here.",
            "Use the worker's role, or ALTER ROLE … RESET default_transaction_read_only.",
        )


def check_durability(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield settings of the server by which a charge that was committed may be gone after a crash."""
    row = connection.execute(
        text(
            "SELECT current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes, "
            "current_setting('synchronous_commit') AS synchronous_commit"
        )
    ).one()
    unsafe = [name for name in ("fsync", "full_page_writes") if getattr(row, name) == "off"]
    for name in unsafe:
        yield error(
            "durability", f"{name} is off: a crash may leave the database corrupt.", f"Set {name} = on, and restart."
        )
    if row.synchronous_commit == "off":
        yield warning(
            "durability",
            "synchronous_commit is off: the last charges before a crash are lost.",
            "Set synchronous_commit = on, for trueup's role at least.",
        )
    elif not unsafe:
        yield ok("durability", "What is committed survives a crash.")
    yield from _check_standbys(connection)
    yield from _check_temporary_files(connection)


def _check_standbys(connection: Connection) -> Iterator[Finding]:
    """Yield a warning if a failover may lose what was committed: a hold, so that its tokens are given twice."""
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
    """Yield how far the database's clock, which decides, is from this machine's."""
    statement = text("SELECT extract(epoch FROM clock_timestamp())")
    offset = measure(lambda: float(connection.execute(statement).scalar_one()))
    yield from judge("database_clock", "The database's clock and this machine's", offset)
