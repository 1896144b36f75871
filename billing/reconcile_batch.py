"""One batch of a reconcile run: bring the balances up to date, find, explain, decide, correct and write it down."""

import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from billing.causes import explain
from billing.drifts import find_drifts
from billing.mapping import HostMapping
from billing.policies import Policy, decide
from billing.reconcile_runs import Finding
from billing.users import UserId


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """What all batches of a run share."""

    mapping: HostMapping
    dry_run: bool
    plan_sizes: frozenset[int]
    counter_limit: int

    @classmethod
    def read(cls, connection: Connection, mapping: HostMapping, *, dry_run: bool) -> "BatchContext":
        sizes = connection.scalars(text("SELECT trueup.plan_sizes()")).all()
        limit = connection.scalar(text("SELECT trueup.counter_limit()"))
        connection.rollback()
        return cls(mapping=mapping, dry_run=dry_run, plan_sizes=frozenset(sizes), counter_limit=limit or 0)


def reconcile_batch(
    connection: Connection, context: BatchContext, run_id: int | None, user_ids: list[UserId]
) -> list[Finding]:
    """Compare these users' counters with the log. `run_id` None: a dry run, which writes nothing at all."""
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
    findings = []
    for drift in drifts:
        explanation = explain(drift, plan_sizes=context.plan_sizes, counter_limit=context.counter_limit, now=now)
        verdict = decide(drift, explanation)
        action = _PLANNED[verdict.policy]
        findings.append(Finding(drift=drift, explanation=explanation, verdict=verdict, action=action, written=None))
    return findings if context.dry_run else _settle(connection, context, run_id, findings, now)


# What stands in a report when nothing is written.
_PLANNED: dict[Policy, str] = {"correct": "reported", "review": "review", "report": "reported"}

# One statement, so that a correction and the row that says why are never there alone, and so that the counters' locks
# are gone before the answer is on its way.
_SETTLE = """
    WITH found AS MATERIALIZED (
        SELECT * FROM unnest(
            CAST(:users AS {user_id_type}[]), CAST(:subscriptions AS text[]), CAST(:observed AS bigint[]),
            CAST(:expected AS bigint[]), CAST(:writes AS bigint[]), CAST(:causes AS text[]),
            CAST(:certainties AS text[]), CAST(:explained AS bigint[]), CAST(:actions AS text[]),
            CAST(:reasons AS text[]), CAST(:evidence AS text[])
        ) AS f (user_id, subscription_id, observed, expected, write, cause, certainty, explained, action, reason,
                evidence)
    ), corrected AS MATERIALIZED (
        SELECT c.user_id FROM (
            SELECT array_agg(user_id) AS users, array_agg(subscription_id) AS subscriptions,
                   array_agg(observed) AS observed, array_agg(write) AS writes
            FROM found WHERE write IS NOT NULL
        ) f, trueup.correct_counters(f.users, f.subscriptions, f.observed, f.writes) AS c (user_id)
    )
    INSERT INTO trueup.drift (user_id, run_id, subscription_id, observed, expected, written, cause, certainty,
                              tokens_explained, action, reason, evidence, found_at, last_run_id, last_seen_at)
    SELECT f.user_id, :run_id, f.subscription_id, f.observed, f.expected,
           CASE WHEN c.user_id IS NOT NULL THEN f.write END, f.cause, f.certainty, f.explained,
           CASE WHEN f.write IS NULL THEN f.action
                WHEN c.user_id IS NULL THEN 'lost_race' ELSE 'corrected' END,
           f.reason, CAST(f.evidence AS jsonb), :now, :run_id, :now
    FROM found f LEFT JOIN corrected c ON c.user_id = f.user_id
    ORDER BY f.user_id
    RETURNING user_id, action, written
"""


def _settle(
    connection: Connection, context: BatchContext, run_id: int | None, findings: list[Finding], now: datetime
) -> list[Finding]:
    """Set the counters right by compare-and-set where the verdict says so, and write every drift down."""
    if not findings:
        return []
    values = {
        "users": [found.drift.user_id for found in findings],
        "subscriptions": [found.drift.subscription_id for found in findings],
        "observed": [found.drift.observed for found in findings],
        "expected": [found.drift.expected for found in findings],
        "writes": [found.verdict.write for found in findings],
        "causes": [found.explanation.cause for found in findings],
        "certainties": [found.explanation.certainty for found in findings],
        "explained": [found.explanation.tokens_explained(found.drift) for found in findings],
        "actions": [found.action for found in findings],
        "reasons": [found.verdict.reason for found in findings],
        "evidence": [json.dumps(found.explanation.as_evidence()) for found in findings],
        "run_id": run_id,
        "now": now,
    }
    rows = connection.execute(text(_SETTLE.format(user_id_type=context.mapping.user_id_type)), values)
    settled = {row.user_id: row for row in rows}
    connection.rollback()
    return [
        Finding(
            drift=found.drift,
            explanation=found.explanation,
            verdict=found.verdict,
            action=settled[found.drift.user_id].action,
            written=settled[found.drift.user_id].written,
        )
        for found in findings
    ]
