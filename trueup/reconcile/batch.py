"""One batch of a reconcile run: refresh the balances, find drifts, explain, decide, correct, record."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId, plain_id
from trueup.drift.action import DEFAULT_RULES, decide
from trueup.drift.detect import find_drifts
from trueup.drift.explain import explain
from trueup.drift.known_drifts import read_past
from trueup.host.mapping import HostMapping
from trueup.reconcile.runs import Finding
from trueup.reconcile.shards import ShardLostError, Step, move_shard
from trueup.settings.policies import Rules

# A user's gate waits while the slice with the user's balance is refreshed.
REFRESHED_AT_ONCE = 100
# The counters of a slice stay locked until the slice is written.
SETTLED_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """The context that all batches of a run share.

    `plan_sizes`: the tokens of all plans. `counter_limit`: the largest value of the counter's column.
    """

    mapping: HostMapping
    dry_run: bool
    plan_sizes: frozenset[int]
    counter_limit: int
    rules: Rules = DEFAULT_RULES

    @classmethod
    def read(
        cls, connection: Connection, mapping: HostMapping, *, dry_run: bool, rules: Rules = DEFAULT_RULES
    ) -> "BatchContext":
        sizes = connection.scalars(text("SELECT trueup.plan_sizes()")).all()
        limit = connection.scalar(text("SELECT trueup.counter_limit()"))
        connection.rollback()
        return cls(mapping=mapping, dry_run=dry_run, plan_sizes=frozenset(sizes), counter_limit=limit or 0, rules=rules)


def reconcile_batch(
    connection: Connection, context: BatchContext, run_id: int | None, user_ids: list[UserId], step: Step | None = None
) -> list[Finding]:
    """Compare these users' counters with the log, correct and record the drifts, and return the findings.

    `run_id` None: a dry run, which writes nothing. `step`: the shard's new cursor, stored in the same transaction as
    the findings; None: the batch belongs to no shard.
    Raises `ShardLostError`, with nothing written, when another process has taken over the shard.
    """
    user_id_type = context.mapping.user_id_type
    if not context.dry_run:
        statement = text(f"SELECT trueup.refresh_balances(CAST(:user_ids AS {user_id_type}[]), NULL)")
        for start in range(0, len(user_ids), REFRESHED_AT_ONCE):
            connection.execute(statement, {"user_ids": user_ids[start : start + REFRESHED_AT_ONCE]})
    min_age = context.rules.min_age_seconds
    drifts = find_drifts(connection, user_ids, user_id_type, min_age_seconds=min_age)
    past = read_past(connection, [drift.user_id for drift in drifts], user_id_type)
    connection.rollback()
    findings = []
    known_rows = {}
    for drift in drifts:
        now = drift.seen_at
        explanation = explain(drift, plan_sizes=context.plan_sizes, counter_limit=context.counter_limit, now=now)
        before = past[drift.user_id]
        history = before.history(drift, now=now, min_age_seconds=min_age)
        verdict = decide(drift, explanation, rules=context.rules, history=history, counter_limit=context.counter_limit)
        row_id = known_rows[drift.user_id] = before.known_row_id(drift, explanation, verdict)
        found = Finding(
            drift=drift,
            explanation=explanation,
            verdict=verdict,
            action=verdict.action,
            written=None,
            is_new=row_id is None,
        )
        findings += _in_parts(found, context.rules) if verdict.held and not context.dry_run else [found]
    if context.dry_run:
        return findings
    settled: list[Finding] = []
    for part in _slices(findings):
        reached = _step_to(step, user_ids, part[-1].drift.user_id)
        settled += _settle(connection, context, run_id, part, known_rows, reached)
    move_shard(connection, run_id, step, user_id_type)
    return settled


def _slices(findings: list[Finding]) -> Iterator[list[Finding]]:
    """Yield the findings in slices of about `SETTLED_AT_ONCE`; a correction and its remainder share one."""
    part: list[Finding] = []
    for found in findings:
        if len(part) >= SETTLED_AT_ONCE and not found.is_remainder:
            yield part
            part = []
        part.append(found)
    if part:
        yield part


def _in_parts(found: Finding, rules: Rules) -> list[Finding]:
    """Split the finding of a correction by component: the first part is corrected, the second stays in the counter.

    The right value of the first is what the correction writes, so that each has the sum of its components.
    """
    drift, explanation, held = found.drift, found.explanation, found.verdict.held
    written = found.verdict.write or 0
    parts = tuple(part for part in explanation.components if part not in held)
    more = {**explanation.evidence, "held_components": [part.as_json() for part in held]}
    corrected = replace(explanation, components=parts, evidence=more, alternatives=())
    left = replace(explanation, components=held, evidence={**explanation.evidence, "after_correction": True})
    verdict = decide(replace(drift, observed=written), left, rules=rules)
    return [
        replace(found, drift=replace(drift, expected=written - explanation.in_flight), explanation=corrected),
        replace(
            found,
            drift=replace(drift, observed=written),
            explanation=left,
            verdict=verdict,
            action=verdict.action,
            is_new=True,
            is_remainder=True,
        ),
    ]


def _step_to(step: Step | None, user_ids: list[UserId], user_id: UserId) -> Step | None:
    """Return the part of the batch's step that ends at `user_id`."""
    if step is None:
        return None
    return replace(step, cursor=user_id, checked=step.checked - len(user_ids) + 1 + user_ids.index(user_id))


# One statement, so that a correction, its drift row and the shard's cursor commit together, and so that the server
# releases the counters' locks before it answers. A process that has lost the shard writes nothing.
_SETTLE = """
    WITH shard AS MATERIALIZED (
        SELECT CASE WHEN CAST(:shard AS integer) IS NULL THEN true
                    ELSE trueup.move_shard(:run_id, :shard, :attempt, CAST(:cursor AS {user_id_type}), :checked)
               END AS is_ours
    ), found AS MATERIALIZED (
        -- One JSON document: thirteen arrays would cost the client more than the rest of the statement.
        SELECT f.* FROM shard, json_to_recordset(CAST(:found AS json)) AS f (
            user_id {user_id_type}, subscription_id text, observed bigint, expected bigint, write bigint, cause text,
            certainty text, explained bigint, action text, reason text, evidence jsonb, known_row_id bigint,
            window_start text, is_remainder boolean)
        WHERE shard.is_ours
    ), corrected AS MATERIALIZED (
        SELECT c.user_id FROM (
            SELECT array_agg(user_id) AS users, array_agg(subscription_id) AS subscriptions,
                   array_agg(observed) AS observed, array_agg(write) AS writes, array_agg(window_start) AS windows
            FROM found WHERE write IS NOT NULL AND NOT is_remainder
        ) f, trueup.correct_counters(f.users, f.subscriptions, f.observed, f.writes, f.windows) AS c (user_id)
    ), seen_again AS (
        -- The next run reads the journal from here.
        UPDATE trueup.drift d SET last_run_id = :run_id, last_seen_at = :now,
               evidence = CASE WHEN f.evidence ? 'journal' THEN f.evidence ELSE d.evidence END
        FROM found f WHERE d.user_id = f.user_id AND d.id = f.known_row_id
        RETURNING d.user_id, f.action
    ), written AS (
        INSERT INTO trueup.drift (user_id, run_id, subscription_id, observed, expected, written, cause, certainty,
                                  tokens_explained, action, reason, evidence, found_at, last_run_id, last_seen_at)
        SELECT f.user_id, :run_id, f.subscription_id, f.observed, f.expected,
               CASE WHEN c.user_id IS NOT NULL AND NOT f.is_remainder THEN f.write END,
               f.cause, f.certainty, f.explained,
               CASE WHEN f.write IS NULL OR f.is_remainder THEN f.action
                    WHEN c.user_id IS NULL THEN 'lost_race' ELSE 'corrected' END,
               f.reason,
               -- The time of the write: a host process that read the counter before may still write the old value back.
               CASE WHEN c.user_id IS NULL OR f.is_remainder THEN f.evidence
                    ELSE f.evidence || jsonb_build_object('written_at', clock_timestamp()) END,
               :now, :run_id, :now
        FROM found f LEFT JOIN corrected c ON c.user_id = f.user_id
        -- Not by known_row_id: that row may have been deleted meanwhile.
        WHERE NOT EXISTS (SELECT FROM seen_again a WHERE a.user_id = f.user_id)
          -- Without the correction, its row has all components.
          AND (NOT f.is_remainder OR c.user_id IS NOT NULL)
        ORDER BY f.user_id, f.is_remainder
        RETURNING user_id, action, written, coalesce((evidence ->> 'after_correction')::boolean, false) AS is_remainder
    )
    SELECT user_id, action, written, true AS is_new, is_remainder FROM written
    UNION ALL
    SELECT user_id, action, NULL, false, false FROM seen_again
"""


def _settle(
    connection: Connection,
    context: BatchContext,
    run_id: int | None,
    findings: list[Finding],
    known_rows: dict[UserId, int | None],
    step: Step | None,
) -> list[Finding]:
    """Correct counters by compare-and-set where the verdict allows it, and record every new drift."""
    values = {
        "found": json.dumps([_as_row(found, known_rows[found.drift.user_id]) for found in findings]),
        "run_id": run_id,
        "now": findings[0].drift.seen_at,
        "shard": step.number if step else None,
        "attempt": step.attempt if step else None,
        "cursor": step.cursor if step else None,
        "checked": step.checked if step else None,
    }
    rows = connection.execute(text(_SETTLE.format(user_id_type=context.mapping.user_id_type)), values)
    settled = {(row.user_id, row.is_remainder): row for row in rows.all()}
    connection.rollback()
    if not settled:
        raise ShardLostError
    keys = ((found, (found.drift.user_id, found.is_remainder)) for found in findings)
    return [_as_settled(found, settled[key]) for found, key in keys if key in settled]


def _as_row(found: Finding, known_row_id: int | None) -> dict[str, Any]:
    drift, explanation = found.drift, found.explanation
    return {
        "user_id": plain_id(drift.user_id),
        "subscription_id": drift.subscription_id,
        "observed": drift.observed,
        "expected": drift.expected,
        "write": found.verdict.write,
        "cause": explanation.cause,
        "certainty": explanation.certainty,
        "explained": explanation.tokens_explained(drift),
        "action": found.action,
        "reason": found.verdict.reason,
        "evidence": explanation.as_evidence(),
        "known_row_id": None if found.is_remainder else known_row_id,
        "is_remainder": found.is_remainder,
        "window_start": drift.window or None,
    }


def _as_settled(found: Finding, row: Any) -> Finding:
    return replace(found, action=row.action, written=row.written, is_new=row.is_new)
