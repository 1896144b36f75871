"""The rows of drift reports: one drift each, selected by run, time, cause, size and user."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, RowMapping, Select, Text, and_, cast, func, or_, select
from sqlalchemy.dialects.postgresql import ARRAY

from trueup.accounts.user_ids import UserId, plain_id
from trueup.database.schema import own_table
from trueup.host.mapping import UserIdType
from trueup.reconcile.runs import Finding


@dataclass(frozen=True, kw_only=True)
class DriftFilter:
    """A filter on the drifts of a report. The default matches all.

    `causes`: the drift has all of these causes. `min_tokens`: the counter is off by at least this many tokens.
    `user_id` None: all users.
    """

    causes: tuple[str, ...] = ()
    min_tokens: int = 0
    user_id: UserId | None = None

    def as_json(self) -> dict[str, Any]:
        return {"causes": list(self.causes), "min_tokens": self.min_tokens, "user_id": plain_id(self.user_id)}


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One drift. Token figures are counts; `drift` = observed - expected, where a null counter counts as 0.

    `drift_id`, `run_id` None: a finding of a dry run, which is not stored. `observed` None: the counter was null.
    `written` None: the counter was not changed. `run_id`: the run that found the drift; `last_run_id`: the last run
    that saw it unchanged. `decision` None: no decision yet.
    """

    drift_id: int | None
    user_id: UserId
    subscription_id: str
    observed: int | None
    expected: int
    drift: int
    cause: str
    certainty: str
    tokens_explained: int
    action: str
    written: int | None
    reason: str
    decision: str | None
    run_id: int | None
    last_run_id: int | None
    found_at: datetime | None
    last_seen_at: datetime | None
    evidence: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the row for JSON, with times in ISO 8601 and the user's id as a number or a string."""
        # Without asdict, which makes a deep copy of the evidence.
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["user_id"] = plain_id(self.user_id)
        for name in ("found_at", "last_seen_at"):
            content[name] = content[name].isoformat() if content[name] else None
        return content


def chosen_drifts(
    user_id_type: UserIdType, only: DriftFilter, *, run: Row[Any] | None = None, since: datetime | None = None
) -> Select[Any]:
    """Return the statement that selects the drifts that `run` saw, or that any run saw after `since`, each once.

    A drift that several runs see is one row: every run from `run_id` to `last_run_id` has seen it, except runs over
    another user only. `only`: the filter.
    """
    drift = own_table("drift", user_id_type)
    query = _drifts(user_id_type)
    tokens = query.selected_columns["drift"]
    if run is not None:
        seen = and_(drift.c.run_id <= run.id, drift.c.last_run_id >= run.id)
        if run.only_user is not None:
            seen = and_(seen, cast(drift.c.user_id, Text) == run.only_user)
        query = query.add_columns((drift.c.run_id == run.id).label("is_new")).where(seen)
    else:
        query = query.add_columns((drift.c.found_at >= since).label("is_new"))
        query = query.where(drift.c.last_seen_at >= since)
    if only.causes:
        named = func.string_to_array(drift.c.cause, "+", type_=ARRAY(Text))
        query = query.where(named.contains(list(only.causes)))
    if only.min_tokens:
        query = query.where(or_(tokens >= only.min_tokens, tokens <= -only.min_tokens))
    if only.user_id is not None:
        query = query.where(drift.c.user_id == only.user_id)
    return query


def drifts_of_user(connection: Connection, user_id_type: UserIdType, user_id: UserId, *, limit: int) -> list[ReportRow]:
    """Return a user's drifts, newest first, at most `limit`."""
    drift = own_table("drift", user_id_type).c
    query = _drifts(user_id_type).where(drift.user_id == user_id).order_by(drift.id.desc()).limit(limit)
    return [_stored_row(row) for row in connection.execute(query).mappings()]


def _drifts(user_id_type: UserIdType) -> Select[Any]:
    """Return the statement for all drifts, each with its tokens as `drift` and the newest `decision` about it."""
    drift, decision = own_table("drift", user_id_type), own_table("drift_decision", user_id_type)
    decided = (
        select(decision.c.decision)
        .where(decision.c.user_id == drift.c.user_id, decision.c.drift_id == drift.c.id)
        .order_by(decision.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    tokens = func.coalesce(drift.c.observed, 0) - drift.c.expected
    stored = (drift.c[name] for name in _STORED if name not in ("drift", "decision"))
    return select(drift.c.id, *stored, tokens.label("drift"), decided.label("decision"))


def read_rows(
    connection: Connection, chosen: Select[Any], *, limit: int | None = None, skip: int = 0
) -> Iterator[ReportRow]:
    """Yield the selected drifts, the largest first, at most `limit` (None: all) after the first `skip`."""
    drifts = chosen.subquery()
    query = select(drifts).order_by(func.abs(drifts.c.drift).desc(), drifts.c.id).limit(limit).offset(skip)
    for row in connection.execute(query).mappings():
        yield _stored_row(row)


def _stored_row(row: RowMapping) -> ReportRow:
    values = {name: row[name] for name in _STORED}
    return ReportRow(drift_id=row["id"], **{**values, "evidence": _public(row["evidence"])})


def _public(evidence: dict[str, Any]) -> dict[str, Any]:
    """Return the evidence without the marks with which the next run goes on."""
    return {name: value for name, value in evidence.items() if name not in ("journal", "after_correction")}


_STORED = [field.name for field in fields(ReportRow) if field.name != "drift_id"]


def row_of_finding(finding: Finding) -> ReportRow:
    """Return the report row of a dry run's finding, which is not stored."""
    drift, explanation = finding.drift, finding.explanation
    return ReportRow(
        drift_id=None,
        user_id=drift.user_id,
        subscription_id=drift.subscription_id,
        observed=drift.observed,
        expected=drift.expected,
        drift=drift.tokens,
        cause=explanation.cause,
        certainty=explanation.certainty,
        tokens_explained=explanation.tokens_explained(drift),
        action=finding.action,
        written=finding.written,
        reason=finding.verdict.reason,
        decision=None,
        run_id=None,
        last_run_id=None,
        found_at=None,
        last_seen_at=None,
        evidence=_public(explanation.as_evidence()),
    )
