"""Reconcile: compare every counter with the log's sums, correct what may be corrected, and say why.

Keyset batches, each a few short transactions: bring the balances up to date, find, then correct and write the drift
rows together. A run holds an advisory lock, so that runs never overlap; a dry run writes nothing at all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, insert, text

from billing.causes import Verdict, judge
from billing.drifts import Drift, find_drifts
from billing.mapping import HostMapping, UserIdType, render_sql
from billing.reconcile_runs import Finding, RunSummary, finish_run, only_run, save_run, start_run
from billing.schema import own_table
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
    Raises `RunInProgressError` if another run is at work.
    """
    with engine.connect() as connection, only_run(connection):
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
    user = mapping.sql_names()["subscription.user_id"]
    query = render_sql(f"SELECT {user} FROM {{{{subscription}}}} WHERE {user} ", mapping)
    if only_user is not None:
        found = connection.scalars(text(query + "= :user"), {"user": only_user}).all()
        connection.rollback()
        if found:
            yield list(found)
        return
    after: UserId | None = None
    while True:
        condition = "IS NOT NULL" if after is None else "> :after"
        statement = text(f"{query} {condition} ORDER BY {user} LIMIT :size")
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
    counted = connection.scalar(text(render_sql("SELECT count(*) FROM {{subscription}}", mapping)))
    connection.rollback()
    return counted or 0


def _reconcile_batch(
    connection: Connection, context: _Context, run_id: int | None, user_ids: list[UserId]
) -> list[Finding]:
    user_id_type = context.mapping.user_id_type
    if not context.dry_run:
        with connection.begin():
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
        return [_finding(drift, verdict, corrected=None) for drift, verdict in judged]
    # The correction and the row that says why are one transaction: neither is ever there alone.
    with connection.begin():
        corrected = _correct(connection, user_id_type, [d for d, verdict in judged if verdict.policy == "correct"])
        findings = [_finding(drift, verdict, corrected=corrected) for drift, verdict in judged]
        _write_drifts(connection, context, run_id, findings, now)
    return findings


def _correct(connection: Connection, user_id_type: UserIdType, drifts: list[Drift]) -> set[UserId]:
    """Set the counters right by compare-and-set. Returns the users whose counter was."""
    if not drifts:
        return set()
    statement = text(
        f"SELECT trueup.correct_counters(CAST(:users AS {user_id_type}[]), CAST(:subscriptions AS text[]), "
        "CAST(:observed AS bigint[]), CAST(:expected AS bigint[]))"
    )
    return set(
        connection.scalars(
            statement,
            {
                "users": [drift.user_id for drift in drifts],
                "subscriptions": [drift.subscription_id for drift in drifts],
                "observed": [drift.observed for drift in drifts],
                "expected": [drift.expected for drift in drifts],
            },
        )
    )


def _finding(drift: Drift, verdict: Verdict, *, corrected: set[UserId] | None) -> Finding:
    """`corrected` None: a dry run, in which nothing is corrected."""
    if verdict.policy == "review":
        action = "review"
    elif verdict.policy == "report" or corrected is None:
        action = "reported"
    else:
        action = "corrected" if drift.user_id in corrected else "lost_race"
    written = drift.expected if action == "corrected" else None
    return Finding(drift=drift, verdict=verdict, action=action, written=written)


def _write_drifts(
    connection: Connection,
    context: _Context,
    run_id: int | None,
    findings: list[Finding],
    now: datetime,
) -> None:
    if not findings:
        return
    connection.execute(
        insert(own_table("drift", context.mapping.user_id_type)),
        [
            {
                "user_id": finding.drift.user_id,
                "run_id": run_id,
                "subscription_id": finding.drift.subscription_id,
                "observed": finding.drift.observed,
                "expected": finding.drift.expected,
                "written": finding.written,
                "cause": finding.verdict.cause,
                "action": finding.action,
                "evidence": finding.verdict.evidence,
                "found_at": now,
            }
            for finding in findings
        ],
    )
