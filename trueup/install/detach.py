"""Remove trueup from a database: its triggers, then its schema. The host's tables stay unchanged and writable.

Each step is its own transaction: close the gate, drop the triggers, drop the schema. If a detach is interrupted, the
next one continues. From the first step on, the gate refuses workers that still run with `NotInstalledError`.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, text

from trueup.database.locks import PATIENCE_SECONDS, take_step
from trueup.database.schema import SCHEMA, build_metadata
from trueup.errors import InvalidInputError, NotInstalledError, TrueupError
from trueup.install.baseline import is_installed
from trueup.install.install import drop_functions

# The tables that `history` keeps, in this order.
HISTORY = (
    "installation",
    "reconcile_run",
    "drift",
    "drift_decision",
    "token_grant",
    "grant_use",
    "charge",
    "owed_charge",
    "gate_mode_change",
)


class DetachRefusedError(TrueupError):
    """Open holds, owed charges or other objects still need trueup's schema. Nothing was removed."""


@dataclass(frozen=True, kw_only=True)
class DetachPlan:
    """What `detach` would remove. `host_tables`: with triggers of trueup's. `open_holds`: not expired, or in a call."""

    host_tables: tuple[str, ...]
    triggers: int
    tables: int
    bytes: int
    open_holds: int


def plan_detach(connection: Connection) -> DetachPlan:
    """Return what `detach` would remove. Raises like `detach`, except for open holds."""
    _refuse_foreign_objects(connection)
    found = connection.execute(_TRIGGERED).all()
    size = connection.execute(_SIZE).one()
    return DetachPlan(
        host_tables=tuple(row.name for row in found),
        triggers=sum(row.triggers for row in found),
        tables=size.tables,
        bytes=size.bytes,
        open_holds=connection.execute(_OPEN_HOLDS).scalar_one(),
    )


def detach(
    *, history: Path | None = None, force: bool = False, patience_seconds: float = PATIENCE_SECONDS
) -> dict[str, int]:
    """Remove triggers and schema; return how many rows `history` keeps of each table. Safe to repeat and to interrupt.

    `history`: a file that must not exist yet; each line is `{"table": …, "row": {…}}`. None: keep nothing. `force`:
    also while holds are open, whose calls are then neither charged nor counted, and while charges are owed, which are
    lost. `patience_seconds`: how long a step keeps retrying for its locks. Raises `InvalidInputError` for the file,
    `DetachRefusedError` for open holds, owed charges and objects that are not trueup's, `HostBusyError`, and
    `NotInstalledError` when there is nothing to remove.
    """
    if history is not None:
        _check_file(history)
    kept: dict[str, int] = {}
    for step, tables in steps(history, force=force, kept=kept):
        take_step(step, tables, patience_seconds=patience_seconds)
    return kept


Step = Callable[[Connection], None]


def steps(history: Path | None, *, force: bool, kept: dict[str, int]) -> Iterator[tuple[Step, list[str]]]:
    """Yield the steps in order, each with the host tables that it locks. The last step fills `kept`."""
    tables: list[str] = []

    def close_gate(connection: Connection) -> None:
        _refuse_foreign_objects(connection)
        # A concurrent gate either commits its hold first, and we count it here, or it finds no functions afterwards.
        connection.execute(text("LOCK TABLE trueup.hold IN SHARE MODE"))
        holds = connection.execute(_OPEN_HOLDS).scalar_one()
        if holds and not force:
            raise DetachRefusedError(
                f"{holds} holds are open, so tasks are running whose usage could not be charged. Nothing was removed. "
                "Stop the workers and wait until the holds end (`trueup holds list`), or give --force."
            )
        owed = connection.scalar(text("SELECT count(*) FROM trueup.owed_charge"))
        if owed and not force:
            raise DetachRefusedError(
                f"The usage log has refused the rows of {owed} charges, and only trueup knows them. Nothing was "
                "removed. Correct what refuses them (`trueup status`) and run `trueup reconcile`, or give --force "
                "with --keep-history to keep them in a file."
            )
        drop_functions(connection)
        tables.extend(row.name for row in connection.execute(_TRIGGERED))

    def remove(condition: str) -> Step:
        # CASCADE drops a function's triggers too. This only needs ownership of the function, not of the host's table.
        def step(connection: Connection) -> None:
            functions = connection.scalars(
                text(
                    "SELECT CAST(CAST(oid AS regprocedure) AS text) FROM pg_proc "
                    f"WHERE pronamespace = to_regnamespace('trueup') AND proname {condition}"
                )
            ).all()
            if functions:
                connection.execute(text(f"DROP FUNCTION {', '.join(functions)} CASCADE"))

        return step

    def remove_schema(connection: Connection) -> None:
        _refuse_foreign_objects(connection)
        tables = connection.scalars(
            text("SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'trueup' ORDER BY 1")
        ).all()
        connection.execute(text(f"LOCK TABLE {', '.join(tables)} IN ACCESS EXCLUSIVE MODE"))
        if history is not None:
            kept.update(_write_history(connection, history))
        connection.execute(text(f"DROP SCHEMA {SCHEMA} CASCADE"))

    yield close_gate, []
    # The log and the subscriptions in two steps, so that no step holds a lock on one while it waits for the other.
    yield remove("<> 'append_window'"), tables
    yield remove("= 'append_window'"), tables
    yield remove_schema, []


_TRIGGERED = text(
    """
    SELECT CAST(CAST(g.tgrelid AS regclass) AS text) AS name, count(*) AS triggers
    FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE p.pronamespace = to_regnamespace('trueup') AND NOT g.tgisinternal
    GROUP BY g.tgrelid ORDER BY 1
    """
)

_SIZE = text(
    "SELECT count(*) AS tables, CAST(coalesce(sum(pg_total_relation_size(oid)), 0) AS bigint) AS bytes "
    "FROM pg_class WHERE relnamespace = to_regnamespace('trueup') AND relkind = 'r'"
)

# An expired hold does not count: the next gate takes its tokens back, unless a call of it may still be in flight.
_OPEN_HOLDS = text(
    """
    SELECT count(*) FROM trueup.hold h
    WHERE h.status = 'open' AND (h.expires_at > clock_timestamp() OR EXISTS (
        SELECT FROM trueup.call_intent c
        WHERE c.user_id = h.user_id AND c.task_id = h.task_id AND c.outcome = 'started'))
    """
)

# Objects of others in trueup's schema, or that depend on it: DROP SCHEMA … CASCADE would drop them too.
_FOREIGN_OBJECTS = text(
    """
    WITH own (class, id) AS (
        SELECT CAST('pg_class' AS regclass), oid FROM pg_class WHERE relnamespace = to_regnamespace('trueup')
        UNION ALL SELECT CAST('pg_proc' AS regclass), oid FROM pg_proc WHERE pronamespace = to_regnamespace('trueup')
        UNION ALL SELECT CAST('pg_type' AS regclass), oid FROM pg_type WHERE typnamespace = to_regnamespace('trueup')
    )
    SELECT 'table ' || CAST(oid AS regclass) FROM pg_class
    WHERE relnamespace = to_regnamespace('trueup') AND relkind IN ('r', 'p', 'v', 'm', 'f')
      AND relname <> ALL (CAST(:tables AS text[]))
    UNION
    SELECT pg_describe_object(d.classid, d.objid, d.objsubid)
    FROM pg_depend d JOIN own ON (d.refclassid, d.refobjid) = (own.class, own.id)
    CROSS JOIN LATERAL pg_identify_object_as_address(d.classid, d.objid, d.objsubid) a
    WHERE a.object_names[1] NOT IN ('trueup', 'pg_toast') AND a.object_names[1] NOT LIKE 'trueup.%'
      AND NOT EXISTS (SELECT FROM pg_trigger g WHERE d.classid = CAST('pg_trigger' AS regclass) AND g.oid = d.objid)
    ORDER BY 1
    """
)


def _refuse_foreign_objects(connection: Connection) -> None:
    """Raise `NotInstalledError` without a schema, `DetachRefusedError` if dropping it would drop others' objects."""
    if not is_installed(connection):
        raise NotInstalledError("This database has no trueup schema: there is nothing to remove.")
    own = [table.name for table in build_metadata("bigint").tables.values()]
    foreign = connection.scalars(_FOREIGN_OBJECTS, {"tables": [*own, "alembic_version"]}).all()
    if foreign:
        raise DetachRefusedError(
            f"Objects that are not trueup's are in its schema or depend on it: {', '.join(foreign)}. Nothing was "
            "removed. Drop or move them first."
        )


def _check_file(path: Path) -> None:
    if path.exists():
        raise InvalidInputError(f"keep_history: {path} exists already. Nothing was removed. Name another file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidInputError(
            f"keep_history: trueup can't write into folder {path.parent}. Nothing was removed. Name another file."
        )


def _write_history(connection: Connection, path: Path) -> dict[str, int]:
    """Write the history file, in full or not at all. Returns how many rows it has of each table."""
    kept = {}
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        part.chmod(0o600)  # it names users
        for table in HISTORY:
            rows = connection.execute(
                text(f"SELECT CAST(to_jsonb(t) AS text) FROM {SCHEMA}.{table} t"),
                execution_options={"stream_results": True, "yield_per": 1_000},
            ).scalars()
            kept[table] = 0
            for row in rows:
                file.write(f'{{"table": {json.dumps(table)}, "row": {row}}}\n')
                kept[table] += 1
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return kept
