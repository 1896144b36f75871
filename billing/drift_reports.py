"""Drift reports: one run's summary and rows, from the database or from a dry run's summary."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from billing.errors import InvalidInputError
from billing.mapping import UserIdType
from billing.reconcile_runs import RunSummary
from billing.schema import own_table
from billing.users import UserId

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One drift. Token figures are counts; `drift` = observed - expected, a null counter read as 0.

    `observed` None: the counter was null. `written` None: the counter was left alone.
    """

    user_id: UserId
    subscription_id: str
    observed: int | None
    expected: int
    drift: int
    cause: str
    certainty: str
    action: str
    written: int | None
    reason: str
    evidence: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """A run and its drifts. `run_id` None: a dry run, which is not kept. `finished_at` None: it has not ended.

    `tokens_overstated`: count shown to users though it is gone; `tokens_understated`: count left but not shown.
    """

    run_id: int | None
    dry_run: bool
    status: str
    started_at: datetime
    finished_at: datetime | None
    checked: int
    drifted: int
    corrected: int
    tokens_overstated: int
    tokens_understated: int
    rows: list[ReportRow]

    def as_json(self) -> dict[str, Any]:
        """Return the report for JSON: times as ISO 8601, everything under a versioned schema."""
        content = asdict(self)
        content["started_at"] = self.started_at.isoformat()
        content["finished_at"] = self.finished_at.isoformat() if self.finished_at else None
        for row in content["rows"]:
            row["user_id"] = row["user_id"] if isinstance(row["user_id"], int) else str(row["user_id"])
        return {"schema_version": SCHEMA_VERSION, **content}


def read_report(connection: Connection, user_id_type: UserIdType, run_id: int | None = None) -> DriftReport | None:
    """Return the report of a run; `run_id` None means the newest one. None: there has been no run yet.

    Raises `InvalidInputError` for a run that does not exist.
    """
    run = own_table("reconcile_run", user_id_type)
    query = select(run).order_by(run.c.id.desc()).limit(1)
    if run_id is not None:
        query = query.where(run.c.id == run_id)
    found = connection.execute(query).one_or_none()
    if found is None:
        if run_id is None:
            return None
        raise InvalidInputError(f"run: there is no reconcile run {run_id}. `trueup drift report` shows the newest")
    drift = own_table("drift", user_id_type)
    rows = connection.execute(select(drift).where(drift.c.run_id == found.id).order_by(drift.c.id))
    return DriftReport(run_id=found.id, status=found.status, rows=[_stored_row(row) for row in rows], **_figures(found))


def report_dry_run(summary: RunSummary) -> DriftReport:
    """Return the report of a dry run, from the findings that it kept in memory."""
    return DriftReport(
        run_id=summary.run_id,
        status="finished",
        **_figures(summary),
        rows=[
            ReportRow(
                user_id=finding.drift.user_id,
                subscription_id=finding.drift.subscription_id,
                observed=finding.drift.observed,
                expected=finding.drift.expected,
                drift=finding.drift.tokens,
                cause=finding.explanation.cause,
                certainty=finding.explanation.certainty,
                action=finding.action,
                written=finding.written,
                reason=finding.verdict.reason,
                evidence=finding.explanation.as_evidence(),
            )
            for finding in summary.findings
        ],
    )


def _figures(run: Any) -> dict[str, Any]:
    """Return what a stored run and a summary in memory call by the same names."""
    names = (
        *("dry_run", "started_at", "finished_at", "checked", "drifted", "corrected"),
        *("tokens_overstated", "tokens_understated"),
    )
    return {name: getattr(run, name) for name in names}


def _stored_row(row: Any) -> ReportRow:
    return ReportRow(
        user_id=row.user_id,
        subscription_id=row.subscription_id,
        observed=row.observed,
        expected=row.expected,
        drift=(row.observed or 0) - row.expected,
        cause=row.cause,
        certainty=row.certainty,
        action=row.action,
        written=row.written,
        reason=row.reason,
        evidence=row.evidence,
    )
