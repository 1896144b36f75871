"""Reconcile: compare every counter with the log's sums, correct what may be corrected, and say why.

Keyset batches, each three statements: bring the balances up to date, find, then correct and write the drift rows
together. Each is a transaction of its own, ended by the server: no row of the host's is locked while it waits to hear
from us. A run holds an advisory lock, so that runs never overlap; a dry run writes nothing at all.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from billing import db
from billing.mapping import HostMapping, render_statement
from billing.reconcile_batch import BatchContext, reconcile_batch
from billing.reconcile_runs import RunSummary, finish_run, only_run, save_run, start_run
from billing.users import UserId

Progress = Callable[[int, int], None]
"""Called after each batch with the counters checked so far and those to check in all (0: not known)."""


def reconcile(
    engine: Engine,
    mapping: HostMapping,
    *,
    dry_run: bool = False,
    only_user: UserId | None = None,
    batch_size: int = 1000,
    keep_findings: bool = False,
    progress: Progress | None = None,
) -> RunSummary:
    """Run one quick pass: counters against balances.

    `only_user`: None means all users. `keep_findings`: put every finding in the summary, for a dry run's report.
    Raises `RunInProgressError` if another run is at work, `ServiceUnavailableError` or `NotInstalledError`.
    """
    with (
        db.translated_errors(),
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        only_run(connection),
    ):
        context = BatchContext.read(connection, mapping, dry_run=dry_run)
        summary = start_run(connection, mapping.user_id_type, dry_run=dry_run, only_user=only_user)
        try:
            total = _count(connection, mapping, only_user) if progress else 0
            for user_ids in _batches(connection, mapping, only_user, batch_size):
                findings = reconcile_batch(connection, context, summary.run_id, user_ids)
                summary.add(len(user_ids), findings)
                if keep_findings:
                    summary.findings.extend(findings)
                save_run(connection, mapping.user_id_type, summary)
                if progress:
                    progress(summary.checked, total)
        except Exception as error:
            # Where even this can't be written, the next run finds this one "running", and marks it interrupted.
            with suppress(DBAPIError):
                connection.rollback()
                finish_run(connection, mapping.user_id_type, summary, status="failed", error=str(error))
            raise
        finish_run(connection, mapping.user_id_type, summary, status="finished", error=None)
    return summary


def _batches(
    connection: Connection, mapping: HostMapping, only_user: UserId | None, size: int
) -> Iterator[list[UserId]]:
    """Yield the subscribed users' ids in order of id, by keyset: each batch is one index range."""
    query = "SELECT {{subscription.user_id}} FROM {{subscription}} WHERE {{subscription.user_id}} "
    if only_user is not None:
        found = connection.scalars(render_statement(query + "= :user", mapping), {"user": only_user}).all()
        connection.rollback()
        if found:
            yield list(found)
        return
    after: UserId | None = None
    while True:
        condition = "IS NOT NULL" if after is None else "> :after"
        order = " ORDER BY {{subscription.user_id}} LIMIT :size"
        statement = render_statement(query + condition + order, mapping)
        values: dict[str, Any] = {"size": size} | ({} if after is None else {"after": after})
        batch = list(connection.scalars(statement, values))
        connection.rollback()
        if not batch:
            return
        yield batch
        after = batch[-1]


def _count(connection: Connection, mapping: HostMapping, only_user: UserId | None) -> int:
    if only_user is not None:
        return 1
    counted = connection.scalar(render_statement("SELECT count(*) FROM {{subscription}}", mapping))
    connection.rollback()
    return counted or 0
