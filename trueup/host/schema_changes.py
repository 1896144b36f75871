"""Errors for a host whose tables no longer fit the mapping, with the remedy."""

from sqlalchemy import Connection, text

from trueup.errors import GateClosedError, HostChangedError, NotInstalledError
from trueup.host.catalog import missing_host_columns, missing_host_tables
from trueup.host.mapping import HostMapping

ROW_SECURITY_REMEDY = "Let trueup's role see all rows: ALTER ROLE … BYPASSRLS, or make it the table's owner."
# In place of the mapping's fingerprint during the setup of a database.
ATTACHING = "attaching"

_STATE = text("SELECT mapping_fingerprint FROM trueup.installation")


def explain(
    connection: Connection, mapping: HostMapping, where: str, cause: str, *, undefined: bool
) -> NotInstalledError | None:
    """Return the error that explains a failed statement by the catalog of now. None: the catalog explains nothing.

    `where`: the database. `cause`: the driver's message. `undefined`: an object that the statement names is missing; it
    may be trueup's own.
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
            f"The host's database at {where} has no {', '.join(missing[:5])} any more ({cause}). Nothing was run, and "
            "the gate is closed. Set the new names under [host] in trueup.toml (`trueup doctor` proposes them), then "
            "run `trueup db attach` or, in a maintenance window, `trueup db init`."
        )
    if not there or not undefined:
        return None
    # The database was ready once, or will be soon, so the gate is closed and tasks may wait.
    state = connection.scalar(_STATE)
    if state == ATTACHING:
        why = "`trueup db attach` is running, or was interrupted."
    elif state != mapping.fingerprint():
        why = "It was set up for another mapping than that of the settings: run `trueup db attach`."
    else:
        why = "It may be set up for another version of trueup: run `trueup db attach`."
    return GateClosedError(f"{not_ready(where, cause)} {why}")


SET_UP = "Run `trueup db attach`; `trueup drift report --read-only` needs no setup."
"""The remedy where the database is not set up for trueup."""


def not_ready(where: str, cause: str) -> NotInstalledError:
    """Return the error for a database that lacks an object, without a known reason."""
    return NotInstalledError(
        f"The database at {where} is not ready for trueup: {cause}. Nothing was run. {SET_UP} Check "
        "the table names under [host] in trueup.toml."
    )


def changed_type(where: str, cause: str) -> HostChangedError:
    """Return the error for a column whose type has changed since the setup."""
    return HostChangedError(
        f"A column of the host's database at {where} has another type than at the setup of trueup ({cause}). Nothing "
        "was run, and the gate is closed. `trueup doctor` names the column. If another column has its values now, map "
        "it under [host] in trueup.toml. Then run `trueup db attach` or, in a maintenance window, `trueup db init`."
    )


def unwatched(where: str, cause: str) -> HostChangedError:
    """Return the error for triggers that differ from those of the setup."""
    return HostChangedError(
        f"The triggers do not count the host's writes in the database at {where}: {cause}. Nothing was run, and the "
        "gate is closed. Run `trueup db attach`: it repairs the triggers and rebuilds the balances from the log."
    )
