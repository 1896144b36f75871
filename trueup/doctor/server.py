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


def check_clock(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield how far the database's clock, which decides, is from this machine's."""
    statement = text("SELECT extract(epoch FROM clock_timestamp())")
    offset = measure(lambda: float(connection.execute(statement).scalar_one()))
    yield from judge("database_clock", "The database's clock and this machine's", offset)
