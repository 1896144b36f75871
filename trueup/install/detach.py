"""Take trueup out of a database: its triggers, then its schema. The host's tables stay as they are, and writable.

The steps, each a transaction of its own: the gate is closed, the triggers go, the schema goes. Stopped between any two,
it goes on where it was when it is run again. From the first step on, workers that still run are refused with one error.
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
from trueup.install.install import drop_functions

# What is kept of the history, in this order.
HISTORY = (
    "installation",
    "reconcile_run",
    "drift",
    "drift_decision",
    "token_grant",
    "grant_use",
    "charge",
    "gate_mode_change",
)


class DetachRefusedError(TrueupError):
    """Something still needs trueup's schema. Nothing was removed."""


@dataclass(frozen=True, kw_only=True)
class DetachPlan:
    """What would be removed. `host_tables`: those with triggers of ours. `open_holds`: not overdue, or in a call."""

    host_tables: tuple[str, ...]
    triggers: int
    tables: int
    bytes: int
    open_holds: int


def plan_detach(connection: Connection) -> DetachPlan:
    """Return what would be removed. Raises `NotInstalledError` when there is nothing, else as `detach`."""
    _refuse_strangers(connection)
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
    """Remove triggers and schema; return the rows kept in `history`, table by table.

    `history`: a file that must not be there yet; each line is `{"table": …, "row": {…}}`. `force`: also while holds are
    open; their calls are then neither charged nor counted. Safe to repeat after any interruption.
    Raises `InvalidInputError` for the file, `DetachRefusedError` for open holds and for what is not ours,
    `HostBusyError`, and `NotInstalledError` when there is nothing to remove.
    """
    if history is not None:
        _check_file(history)
    kept: dict[str, int] = {}
    for step, tables in steps(history, force=force, kept=kept):
        take_step(step, tables, patience_seconds=patience_seconds)
    return kept


Step = Callable[[Connection], None]


def steps(history: Path | None, *, force: bool, kept: dict[str, int]) -> Iterator[tuple[Step, list[str]]]:
    """Yield the steps in order, each with the host tables that it locks. The last one fills `kept`."""
    tables: list[str] = []

    def close_gate(connection: Connection) -> None:
        _refuse_strangers(connection)
        # A gate that is at work now either has its hold before us, or finds nothing to charge by after us.
        connection.execute(text("LOCK TABLE trueup.hold IN SHARE MODE"))
        holds = connection.execute(_OPEN_HOLDS).scalar_one()
        if holds and not force:
            raise DetachRefusedError(
                f"{holds} holds are open: tasks are at work, and what they spend could not be charged. Nothing was "
                "removed. Stop the workers and let the holds end (`trueup holds list`), or give --force."
            )
        drop_functions(connection)
        tables.extend(row.name for row in connection.execute(_TRIGGERED))

    def remove(condition: str) -> Step:
        # With the function its triggers go, which needs no more than to own the function.
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
        _refuse_strangers(connection)
        there = connection.scalars(
            text("SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'trueup' ORDER BY 1")
        ).all()
        connection.execute(text(f"LOCK TABLE {', '.join(there)} IN ACCESS EXCLUSIVE MODE"))
        if history is not None:
            kept.update(_write_history(connection, history))
        connection.execute(text(f"DROP SCHEMA {SCHEMA} CASCADE"))

    yield close_gate, []
    # The log and the subscriptions apart: nobody waits for one of them while we have the other.
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

# One that is overdue is taken back by the next gate, unless a call of it may still be in flight.
_OPEN_HOLDS = text(
    """
    SELECT count(*) FROM trueup.hold h
    WHERE h.status = 'open' AND (h.expires_at > clock_timestamp() OR EXISTS (
        SELECT FROM trueup.call_intent c
        WHERE c.user_id = h.user_id AND c.task_id = h.task_id AND c.outcome = 'started'))
    """
)

# What somebody else has made in our schema, or made to depend on it: the schema would take it along.
_STRANGERS = text(
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


def _refuse_strangers(connection: Connection) -> None:
    """Raise `NotInstalledError` or `DetachRefusedError` unless all that the schema would take along is ours."""
    if connection.scalar(text("SELECT to_regclass('trueup.installation') IS NULL")):
        raise NotInstalledError("This database has no trueup schema: there is nothing to remove.")
    own = [table.name for table in build_metadata("bigint").tables.values()]
    strangers = connection.scalars(_STRANGERS, {"tables": [*own, "alembic_version"]}).all()
    if strangers:
        raise DetachRefusedError(
            f"What is not trueup's own depends on its schema: {', '.join(strangers)}. Nothing was removed. "
            "Drop or move it first."
        )


def _check_file(path: Path) -> None:
    if path.exists():
        raise InvalidInputError(f"keep_history: {path} is there already. Nothing was removed. Name another file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidInputError(f"keep_history: {path.parent} is no folder that can be written. Nothing was removed.")


def _write_history(connection: Connection, path: Path) -> dict[str, int]:
    """Write the history, and return its rows table by table. The file is there in full or not at all."""
    kept = {}
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        part.chmod(0o600)  # it names users, and what they asked for
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
