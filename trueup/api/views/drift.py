"""Reconcile runs and their drifts, for operators: `/api/drift/…`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import ConfigDict, Field
from sqlalchemy import Connection

from trueup.api.auth import Operator
from trueup.api.errors import AUTHENTICATED, ApiError, responses
from trueup.api.schemas import Body, Tokens
from trueup.database.retry import retrying
from trueup.errors import NotFoundError
from trueup.host.mapping import UserIdType
from trueup.reports.history import SCHEMA_VERSION as HISTORY_VERSION
from trueup.reports.history import read_history
from trueup.reports.rows import ReportRow
from trueup.reports.run_report import SCHEMA_VERSION as REPORT_VERSION
from trueup.reports.run_report import find_source, read_source
from trueup.settings.settings import get_settings

MAX_RUN = 2**63 - 1
MAX_SKIP = 1_000_000

RunId = Annotated[int, Field(ge=1, le=MAX_RUN)]
Count = Annotated[int, Field(ge=0)]

router = APIRouter(prefix="/api/drift", tags=["drift"], responses=responses(*AUTHENTICATED, 403))


class Run(Body):
    """One reconcile run. `only_user` null: it covers all users; `finished_at` null: it has not ended."""

    run_id: int
    kind: Literal["quick", "deep"]
    only_user: str | None
    status: str
    started_at: datetime
    finished_at: datetime | None
    checked: Count
    drifted: Count
    found_new: Count
    corrected: Count
    in_review: Count
    tokens_overstated: Tokens
    tokens_understated: Tokens
    tokens_drifted: Tokens
    tokens_explained: Tokens
    share_explained: float | None
    defects: Count
    error: str | None
    requested_by: str


class Runs(Body):
    """Runs, newest first. `next_before`: the value of `before` for the next page; null: there is none."""

    schema_version: int = Field(examples=[HISTORY_VERSION])
    runs: list[Run]
    next_before: int | None


class Report(Body):
    """The report of a run, largest drifts first. The fields are those of docs/drift-report.schema.json.

    `next_skip`: the value of `skip` for the next page of rows; null: there is none.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    schema_version: int = Field(examples=[REPORT_VERSION])
    run_id: int
    kind: Literal["quick", "deep"]
    status: str
    started_at: datetime
    finished_at: datetime | None
    checked: Count
    drifted: Count
    corrected: Count
    in_review: Count
    tokens_overstated: Tokens
    tokens_understated: Tokens
    causes: list[dict[str, Any]]
    rows: list[ReportRow]
    rows_left_out: Count
    next_skip: int | None


class RunsQuery(Body):
    """Selects runs."""

    limit: int = Field(default=30, ge=1, le=200, description="runs in a page")
    before: RunId | None = Field(default=None, description="only runs before this one")


class ReportQuery(Body):
    """Selects drifts of a run."""

    limit: int = Field(default=100, ge=1, le=1000, description="rows in a page")
    skip: int = Field(default=0, ge=0, le=MAX_SKIP, description="rows to skip: those of the earlier pages")


@router.get("/runs")
def runs(_operator: Operator, query: Annotated[RunsQuery, Query()]) -> Runs:
    """List the reconcile runs, newest first."""
    user_id_type = get_settings().host.user_id_type

    def read(connection: Connection) -> list[Mapping[str, Any]]:
        # Read one run more than requested, to know whether another page follows.
        up_to = None if query.before is None else query.before - 1
        found = read_history(connection, user_id_type, limit=query.limit + 1, up_to_run=up_to)
        return [run.as_json() for run in reversed(found)]

    found = retrying(read)
    page = [Run.model_validate(run) for run in found[: query.limit]]
    more = len(found) > query.limit
    return Runs(schema_version=HISTORY_VERSION, runs=page, next_before=page[-1].run_id if more else None)


@router.get("/runs/{run_id}", responses=responses(404))
def run(_operator: Operator, run_id: Annotated[RunId, Path()], query: Annotated[ReportQuery, Query()]) -> Report:
    """Show the report of a run: its totals, and a page of its drifts."""
    user_id_type = get_settings().host.user_id_type
    found = retrying(lambda connection: _report(connection, user_id_type, run_id, query))
    return Report.model_validate(found)


def _report(connection: Connection, user_id_type: UserIdType, run_id: int, query: ReportQuery) -> dict[str, Any]:
    try:
        source = find_source(connection, user_id_type, run_id)
    except NotFoundError:
        source = None
    if source is None:
        raise ApiError(404, "not_found", f"Reconcile run {run_id} does not exist")
    report = read_source(connection, source, max_rows=query.limit, skip=query.skip)
    seen = query.skip + len(report.rows)
    return {**report.as_json(), "next_skip": seen if report.rows and report.rows_left_out else None}
