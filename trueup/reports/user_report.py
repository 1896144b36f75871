"""The report on one user's counter: its figures, its drift with an explanation, earlier drifts and decisions."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, text

from trueup.accounts.account import Account, read_account
from trueup.accounts.user_ids import UserId, plain_id
from trueup.database.schema import own_table
from trueup.drift.action import DEFAULT_RULES
from trueup.drift.journal import tell_story
from trueup.drift.telling import Told
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_statement
from trueup.reconcile.batch import BatchContext, reconcile_batch
from trueup.reconcile.runs import Finding
from trueup.reports.rows import ReportRow, drifts_of_user
from trueup.settings.policies import Rules

SCHEMA_VERSION = 1
MAX_PAST_DRIFTS = 20
MAX_TOLD = 50


@dataclass(frozen=True, kw_only=True)
class BasePoint:
    """The last time at which a counter is known to have been right. Only events after it can explain a drift.

    `why`: how this is known. `at` None: no such time is known, or Python cannot represent it.
    """

    at: datetime | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A person's decision about a drift. A counter is None if it was null or was not changed."""

    drift_id: int
    decision: str
    decided_by: str
    note: str
    counter_before: int | None
    counter_after: int | None
    grant_id: int | None
    decided_at: datetime


@dataclass(frozen=True, kw_only=True)
class CounterStory:
    """One user's counter now, and its past. `finding` None: the counter does not drift.

    `told`: the newest changes of the counter since it was last known, by the journal; empty without a journal. `plans`:
    the names of the plans that are as large as its surplus or as one of its components, by their tokens.
    """

    account: Account
    finding: Finding | None
    base: BasePoint
    past: list[ReportRow]
    decisions: list[Decision]
    told: list[Told]
    plans: dict[int, list[str]]

    @property
    def original(self) -> int:
        """Plan and grants in tokens. If there is a finding, all figures come from its snapshot."""
        return self.finding.drift.original if self.finding else self.account.original

    @property
    def consumed(self) -> int:
        return self.finding.drift.consumed if self.finding else self.account.consumed

    @property
    def observed(self) -> int | None:
        return self.finding.drift.observed if self.finding else self.account.counter

    @property
    def expected(self) -> int:
        if self.finding:
            return self.finding.drift.expected
        return self.account.remaining if self.account.right_counter is None else self.account.right_counter

    @property
    def drift(self) -> int:
        """observed - expected in tokens, where a null counter counts as 0."""
        return 0 if self.account.unlimited else (self.observed or 0) - self.expected

    def as_json(self) -> dict[str, Any]:
        """Return everything for JSON, in a versioned schema."""
        found = self.finding
        return {
            "schema_version": SCHEMA_VERSION,
            "user_id": plain_id(self.account.user_id),
            "subscribed": self.account.subscribed,
            "is_active": self.account.is_active,
            "window_start": self.account.window_start,
            "end_date": self.account.end_date,
            "original": self.original,
            "consumed": self.consumed,
            "held": self.account.held,
            "observed": self.observed,
            "expected": self.expected,
            "drift": self.drift,
            "cause": found.explanation.cause if found else None,
            "certainty": found.explanation.certainty if found else None,
            "evidence": found.explanation.as_evidence() if found else None,
            "action": found.action if found else None,
            "reason": found.verdict.reason if found else None,
            "would_write": found.verdict.write if found else None,
            "base": asdict(self.base),
            "past": [row.as_json() for row in self.past],
            "decisions": [asdict(decision) for decision in self.decisions],
            "story": [asdict(told) for told in self.told],
            "plans_of_this_size": self.plans,
        }


def report_counter(
    connection: Connection, mapping: HostMapping, user_id: UserId, *, rules: Rules = DEFAULT_RULES
) -> CounterStory:
    """Return the report on a user's counter. Writes nothing.

    `connection`: one on which each statement is its own transaction. `rules`: the policies that decide what a run would
    do about the drift.
    """
    account = read_account(connection, user_id)
    findings: list[Finding] = []
    if account.subscribed:
        context = BatchContext.read(connection, mapping, dry_run=True, rules=rules)
        findings = reconcile_batch(connection, context, None, [user_id])
    return CounterStory(
        account=account,
        finding=findings[0] if findings else None,
        base=_base_point(connection, user_id),
        past=drifts_of_user(connection, mapping.user_id_type, user_id, limit=MAX_PAST_DRIFTS),
        decisions=_decisions(connection, mapping, user_id),
        told=tell_story(connection, mapping, user_id, most=MAX_TOLD) if account.subscribed else [],
        plans=_plans_of_size(connection, mapping, findings[0]) if findings else {},
    )


_PLANS = """
    SELECT p.size, array_agg(DISTINCT p.name ORDER BY p.name) AS names
    FROM (SELECT t.{{ token_plan.tokens_included }}::bigint AS size, {{ token_plan.name("t") }}::text AS name
          FROM {{ token_plan }} t
          UNION ALL
          SELECT f.{{ full_plan.tokens_included }}::bigint, {{ full_plan.name("f") }}::text FROM {{ full_plan }} f) p
    WHERE p.size = ANY (CAST(:sizes AS bigint[]))
    GROUP BY p.size
"""


def _plans_of_size(connection: Connection, mapping: HostMapping, found: Finding) -> dict[int, list[str]]:
    """Return the names of the plans that are as large as the surplus of the finding, or as one of its components."""
    tokens = {found.drift.tokens, *(part.tokens for part in found.explanation.components)}
    sizes = [size for size in tokens if size > 0]
    if not sizes:
        return {}
    return {row.size: row.names for row in connection.execute(render_statement(_PLANS, mapping), {"sizes": sizes})}


# A window may begin at -infinity, or in a year outside Python's range. Both give no time.
_BASE = text(
    """
    SELECT CASE WHEN b.at >= '0001-01-03' AND b.at < '9999-12-31' THEN b.at END AS at, b.kind
    FROM trueup.accounts(clock_timestamp()) a
    CROSS JOIN LATERAL trueup.base_points(ARRAY[a.user_id], ARRAY[a.subscription_id], ARRAY[a.window_start]) b
    WHERE a.user_id = :user_id
    """
)
_WHY = {
    "window": "the window began",
    "run": "a run over all users found no drift",
    "correction": "a run set the counter right",
    "decision": "a person decided about a drift",
}


def _base_point(connection: Connection, user_id: UserId) -> BasePoint:
    row = connection.execute(_BASE, {"user_id": user_id}).one_or_none()
    return BasePoint(at=row.at, why=_WHY[row.kind]) if row else BasePoint(at=None, why="there is no subscription")


def _decisions(connection: Connection, mapping: HostMapping, user_id: UserId) -> list[Decision]:
    """Return the decisions about this user's drifts, newest first."""
    table = own_table("drift_decision", mapping.user_id_type).c
    names = Decision.__dataclass_fields__
    query = select(*(table[name] for name in names)).where(table.user_id == user_id).order_by(table.id.desc())
    return [Decision(**row) for row in connection.execute(query.limit(MAX_PAST_DRIFTS)).mappings()]
