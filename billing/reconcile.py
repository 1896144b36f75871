"""Reconcile: compare every counter with the log's sums, correct what may be corrected, and say why.

Keyset batches, each three statements: bring the balances up to date, find, then correct and write the drift rows
together. Each is a transaction of its own, ended by the server: no row of the host's is locked while it waits to hear
from us. A run holds an advisory lock, so that runs never overlap; a dry run writes nothing at all.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from billing import db
from billing.causes import Policy, Verdict, judge
from billing.drifts import Drift, find_drifts
from billing.mapping import HostMapping, render_statement
from billing.reconcile_runs import Finding, RunSummary, finish_run, only_run, save_run, start_run
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
        context = _Context.read(connection, mapping, dry_run=dry_run)
        summary = start_run(connection, mapping.user_id_type, dry_run=dry_run, only_user=only_user)
        try:
            total = _count(connection, mapping, only_user) if progress else 0
            for user_ids in _batches(connection, mapping, only_user, batch_size):
                findings = _reconcile_batch(connection, context, summary.run_id, user_ids)
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


@dataclass(frozen=True, kw_only=True)
class _Context:
    mapping: HostMapping
    dry_run: bool
    plan_sizes: frozenset[int]
    counter_limit: int

    @classmethod
    def read(cls, connection: Connection, mapping: HostMapping, *, dry_run: bool) -> "_Context":
        sizes = connection.scalars(text("SELECT trueup.plan_sizes()")).all()
        limit = connection.scalar(text("SELECT trueup.counter_limit()"))
        connection.rollback()
        return cls(mapping=mapping, dry_run=dry_run, plan_sizes=frozenset(sizes), counter_limit=limit or 0)


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


def _reconcile_batch(
    connection: Connection, context: _Context, run_id: int | None, user_ids: list[UserId]
) -> list[Finding]:
    user_id_type = context.mapping.user_id_type
    if not context.dry_run:
        connection.execute(
            text(f"SELECT trueup.refresh_balances(CAST(:user_ids AS {user_id_type}[]), NULL)"),
            {"user_ids": user_ids},
        )
    now = connection.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(now, datetime)  # noqa: S101 - for the type checker: a query of one value
    drifts = find_drifts(connection, user_ids, user_id_type, now=now)
    connection.rollback()
    judged = [
        (
            drift,
            judge(
                drift,
                plan_sizes=context.plan_sizes,
                counter_limit=context.counter_limit,
                now=now,
            ),
        )
        for drift in drifts
    ]
    if context.dry_run:
        return [_finding(drift, verdict, _UNCORRECTED[verdict.policy]) for drift, verdict in judged]
    return _settle(connection, context, run_id, judged, now)


_UNCORRECTED: dict[Policy, str] = {"correct": "reported", "review": "review", "report": "reported"}


def _finding(drift: Drift, verdict: Verdict, action: str) -> Finding:
    written = drift.expected if action == "corrected" else None
    return Finding(drift=drift, verdict=verdict, action=action, written=written)


# One statement, so that a correction and the row that says why are never there alone, and so that the counters' locks
# are gone before the answer is on its way.
_SETTLE = """
    WITH found AS MATERIALIZED (
        SELECT * FROM unnest(
            CAST(:users AS {user_id_type}[]), CAST(:subscriptions AS text[]), CAST(:observed AS bigint[]),
            CAST(:expected AS bigint[]), CAST(:causes AS text[]), CAST(:actions AS text[]),
            CAST(:evidence AS text[])
        ) AS f (user_id, subscription_id, observed, expected, cause, action, evidence)
    ), corrected AS MATERIALIZED (
        SELECT c.user_id FROM (
            SELECT array_agg(user_id) AS users, array_agg(subscription_id) AS subscriptions,
                   array_agg(observed) AS observed, array_agg(expected) AS expected
            FROM found WHERE action = 'correct'
        ) f, trueup.correct_counters(f.users, f.subscriptions, f.observed, f.expected) AS c (user_id)
    )
    INSERT INTO trueup.drift (user_id, run_id, subscription_id, observed, expected, written,
                              cause, action, evidence, found_at)
    SELECT f.user_id, :run_id, f.subscription_id, f.observed, f.expected,
           CASE WHEN c.user_id IS NOT NULL THEN f.expected END, f.cause,
           CASE WHEN f.action <> 'correct' THEN f.action
                WHEN c.user_id IS NULL THEN 'lost_race' ELSE 'corrected' END,
           CAST(f.evidence AS jsonb), :now
    FROM found f LEFT JOIN corrected c ON c.user_id = f.user_id
    ORDER BY f.user_id
    RETURNING user_id, action
"""


def _settle(
    connection: Connection,
    context: _Context,
    run_id: int | None,
    judged: list[tuple[Drift, Verdict]],
    now: datetime,
) -> list[Finding]:
    """Set the counters right by compare-and-set where the verdict says so, and write every drift down."""
    if not judged:
        return []
    values = {
        "users": [drift.user_id for drift, _ in judged],
        "subscriptions": [drift.subscription_id for drift, _ in judged],
        "observed": [drift.observed for drift, _ in judged],
        "expected": [drift.expected for drift, _ in judged],
        "causes": [verdict.cause for _, verdict in judged],
        "actions": [
            "correct" if verdict.policy == "correct" else _UNCORRECTED[verdict.policy] for _, verdict in judged
        ],
        "evidence": [json.dumps(verdict.evidence) for _, verdict in judged],
        "run_id": run_id,
        "now": now,
    }
    rows = connection.execute(text(_SETTLE.format(user_id_type=context.mapping.user_id_type)), values)
    actions = {row.user_id: row.action for row in rows}
    connection.rollback()
    return [_finding(drift, verdict, actions[drift.user_id]) for drift, verdict in judged]
