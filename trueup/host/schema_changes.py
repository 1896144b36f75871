"""What became of the host's tables: said when a statement stumbles over it, with the remedy."""

from sqlalchemy import Connection, text

from trueup.errors import GateClosedError, HostChangedError, NotInstalledError
from trueup.host.catalog import missing_host_columns, missing_host_tables
from trueup.host.mapping import HostMapping

ROW_SECURITY_REMEDY = "Let trueup's role see all rows: ALTER ROLE … BYPASSRLS, or make it the table's owner."
# Stands for the mapping while the database is made ready for one.
ATTACHING = "attaching"

_STATE = text("SELECT mapping_fingerprint FROM trueup.installation")


def explain(
    connection: Connection, mapping: HostMapping, where: str, cause: str, *, undefined: bool
) -> NotInstalledError | None:
    """Return the error for a statement that met what it did not expect, by what the catalog says now.

    `undefined`: something it named is not there, which may be trueup's own. None: the catalog explains nothing.
    """
    tables = missing_host_tables(connection, mapping)
    columns = missing_host_columns(connection, mapping)
    missing = [
        *(f"table {table}" for table in tables),
        *(f"column {column}" for column in columns if column.rpartition(".")[0] not in tables),
    ]
    there = bool(connection.scalar(text("SELECT to_regclass('trueup.installation') IS NOT NULL")))
    if there and missing:
        return HostChangedError(
            f"The host's database at {where} has no {', '.join(missing[:5])} any more ({cause}). Nothing was run: the "
            "gate is closed. Set the new names under [host] in trueup.toml (`trueup doctor` proposes them), and run "
            "`trueup db attach` or, in a maintenance window, `trueup db init`."
        )
    if not there or not undefined:
        return None
    # It was ready once, or is about to be: what has to wait may wait.
    state = connection.scalar(_STATE)
    if state == ATTACHING:
        why = "trueup is just being attached to it, or was interrupted."
    elif state != mapping.fingerprint():
        why = "It was set up for other names of the host than the settings now say: run `trueup db attach`."
    else:
        why = "It may be of another version than this code: run `trueup db attach`."
    return GateClosedError(f"{not_ready(where, cause)} {why}")


def not_ready(where: str, cause: str) -> NotInstalledError:
    """Return the error for a database that lacks something, where no more is known."""
    return NotInstalledError(
        f"The database at {where} is not ready for trueup: {cause}. Nothing was run. Run `trueup db init`, and check "
        "the table names under [host] in trueup.toml."
    )


def changed_type(where: str, cause: str) -> HostChangedError:
    """Return the error for a column that is of another type than when the database was set up."""
    return HostChangedError(
        f"A column of the host's database at {where} is of another type than trueup was set up for ({cause}). Nothing "
        "was run: the gate is closed. `trueup doctor` names it. If another column has its values now, set that under "
        "[host] in trueup.toml; then run `trueup db attach` or, in a maintenance window, `trueup db init`."
    )


def unwatched(where: str, cause: str) -> HostChangedError:
    """Return the error for triggers that are not those which the database was made ready with."""
    return HostChangedError(
        f"What the host writes in the database at {where} is not counted: {cause}. Nothing was run: the gate is "
        "closed. Run `trueup db attach`: it puts the triggers in place, and builds the balances anew from the log."
    )
