import json
from datetime import timedelta

import pytest
from sqlalchemy import Connection

from billing import db
from billing.drift_reports import SCHEMA_VERSION, DriftReport, read_report, report_dry_run
from billing.errors import InvalidInputError
from billing.mapping import HostMapping
from billing.reconcile import reconcile
from tests.support.host import START, Host


@pytest.fixture
def drifted(host: Host) -> list[int]:
    """Users with: a missed decrement, a null counter, a credit, and no drift."""
    users = [host.subscriber(10_000), host.subscriber(10_000, counter=None), host.subscriber(10_000, counter=15_000)]
    host.log(users[0], 300)
    return [*users, host.subscriber(10_000)]


def read(connection: Connection, run_id: int | None = None) -> DriftReport:
    report = read_report(connection, "bigint", run_id)
    assert report is not None
    return report


def test_the_report_tells_of_the_newest_run(host: Host, connection: Connection, drifted: list[int]) -> None:
    assert read_report(connection, "bigint") is None
    summary = reconcile(db.get_engine(), HostMapping())
    report = read(connection)
    assert (report.run_id, report.status, report.dry_run) == (summary.run_id, "finished", False)
    assert (report.checked, report.drifted, report.corrected) == (4, 3, 2)
    assert (report.tokens_overstated, report.tokens_understated) == (5_300, 10_000)
    assert [(row.user_id, row.drift, row.action, row.written) for row in report.rows] == [
        (drifted[0], 300, "corrected", 9_700),
        (drifted[1], -10_000, "corrected", 10_000),
        (drifted[2], 5_000, "review", None),
    ]
    reconcile(db.get_engine(), HostMapping())
    assert [row.user_id for row in read(connection).rows] == [drifted[2]]
    assert read(connection, summary.run_id) == report


def test_a_run_that_does_not_exist_is_refused_by_name(host: Host, connection: Connection) -> None:
    with pytest.raises(InvalidInputError, match="no reconcile run 99"):
        read_report(connection, "bigint", 99)


def test_a_dry_runs_report_finds_what_a_run_would(host: Host, connection: Connection, drifted: list[int]) -> None:
    dry = report_dry_run(reconcile(db.get_engine(), HostMapping(), dry_run=True, keep_findings=True))
    reconcile(db.get_engine(), HostMapping())
    stored = read(connection)
    assert (dry.run_id, dry.dry_run, dry.corrected) == (None, True, 0)
    for field in ("checked", "drifted", "tokens_overstated", "tokens_understated"):
        assert getattr(dry, field) == getattr(stored, field)
    assert [(row.user_id, row.observed, row.expected, row.cause, row.evidence) for row in dry.rows] == [
        (row.user_id, row.observed, row.expected, row.cause, row.evidence) for row in stored.rows
    ]
    assert {row.written for row in dry.rows} == {None}


def test_the_json_is_versioned_and_plain(host: Host, connection: Connection, drifted: list[int]) -> None:
    host.log(drifted[3], 40, at=START + timedelta(hours=2))
    reconcile(db.get_engine(), HostMapping())
    content = json.loads(json.dumps(read(connection).as_json()))
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["finished_at"] >= content["started_at"]
    assert content["rows"][0] == {
        "user_id": drifted[0],
        "subscription_id": str(host.value("SELECT id FROM billing_subscription WHERE user_id = :u", u=drifted[0])),
        "observed": 10_000,
        "expected": 9_700,
        "drift": 300,
        "cause": "missed_decrement",
        "certainty": "likely",
        "action": "corrected",
        "written": 9_700,
        "reason": "policy of missed_decrement",
        "evidence": content["rows"][0]["evidence"],
    }
    assert content["rows"][0]["evidence"]["newest"][0]["tokens"] == 300
