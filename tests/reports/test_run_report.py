import json
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from sqlalchemy import Connection

from tests.support.drift_history import FIRST_RUN, add_drift, add_run, decide, see_again
from tests.support.host import Host
from trueup.database.engine import get_engine, transaction
from trueup.drift.causes import ACTION_SENTENCES, CAUSE_SENTENCES, Cause
from trueup.errors import NotFoundError
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.reports.history import history_json, read_history
from trueup.reports.rows import DriftFilter, ReportRow
from trueup.reports.run_report import SCHEMA_VERSION, DriftReport, find_source, read_report, report_dry_run, stream_rows
from trueup.reports.user_report import report_counter

pytestmark = pytest.mark.dated


@pytest.fixture
def drifted(host: Host) -> list[int]:
    """Users with: a missed decrement, a null counter, a credit, and no drift."""
    users = [host.subscriber(10_000), host.subscriber(10_000, counter=None), host.subscriber(10_000, counter=15_000)]
    host.log(users[0], 300)
    return [*users, host.subscriber(10_000)]


@pytest.fixture
def past(host: Host) -> dict[str, int]:
    """Three runs. All see a credit; the second also finds a combination of causes, and a drift without explanation."""
    runs = [add_run(host, checked=100) for _ in range(3)]
    ids = {
        "credit": add_drift(host, runs[0], 1, 15_000, 10_000, ("credit_without_grant", 5_000), action="review"),
        "missed": add_drift(host, runs[0], 2, 900, 600, ("missed_decrement", 300), certainty="inferred"),
        "pair": add_drift(
            host, runs[1], 3, 1_000, 940, ("missed_decrement", 80), ("double_decrement", -20), certainty="inferred"
        ),
        "unknown": add_drift(host, runs[1], 4, None, 7_000),
    }
    for run in runs[1:]:
        see_again(host, ids["credit"], run)
    return ids | {f"run {number}": run for number, run in enumerate(runs, 1)}


@pytest.fixture
def in_one_transaction(host: Host) -> Iterator[Connection]:
    with transaction() as connection:
        yield connection


def read(connection: Connection, run_id: int | None = None, **chosen: object) -> DriftReport:
    report = read_report(connection, "bigint", run_id, **chosen)  # type: ignore[arg-type]
    assert report is not None
    return report


def users(report: DriftReport) -> list[object]:
    return [row.user_id for row in report.rows]


def test_the_report_is_about_the_newest_run(host: Host, connection: Connection, drifted: list[int]) -> None:
    assert read_report(connection, "bigint") is None
    summary = reconcile(get_engine(), HostMapping())
    report = read(connection)
    assert (report.run_id, report.status, report.dry_run) == (summary.run_id, "finished", False)
    assert (report.checked, report.drifted, report.found_new, report.corrected) == (4, 3, 3, 2)
    assert (report.tokens_overstated, report.tokens_understated) == (5_300, 10_000)
    assert [(row.user_id, row.drift, row.action, row.written) for row in report.rows] == [
        (drifted[1], -10_000, "corrected", 10_000),
        (drifted[2], 5_000, "review", None),
        (drifted[0], 300, "corrected", 9_700),
    ]
    reconcile(get_engine(), HostMapping())
    assert users(read(connection)) == [drifted[2]]
    assert users(read(connection, summary.run_id)) == users(report)


def test_a_drift_is_reported_by_each_run_that_saw_it_and_is_new_in_one(
    host: Host, connection: Connection, past: dict[str, int]
) -> None:
    reports = [read(connection, past[f"run {number}"]) for number in (1, 2, 3)]
    assert [users(report) for report in reports] == [[1, 2], [4, 1, 3], [1]]
    assert [report.found_new for report in reports] == [2, 2, 0]
    assert [report.in_review for report in reports] == [1, 1, 1]


def test_a_run_over_one_user_does_not_report_drifts_of_other_users(
    host: Host, connection: Connection, past: dict[str, int]
) -> None:
    of_two, of_one = add_run(host, only_user="2"), add_run(host, only_user="1")
    see_again(host, past["credit"], add_run(host))
    assert users(read(connection, of_two)) == []
    assert users(read(connection, of_one)) == [1]


def test_a_report_on_all_runs_since_a_time_has_each_drift_once(
    host: Host, connection: Connection, past: dict[str, int]
) -> None:
    whole = read(connection, since=FIRST_RUN)
    assert (whole.run_id, whole.runs, whole.checked, whole.status) == (None, 3, 300, "finished")
    assert (whole.drifted, whole.found_new, users(whole)) == (4, 4, [4, 1, 2, 3])
    later = read(connection, since=FIRST_RUN + timedelta(hours=1))
    assert (later.runs, users(later), later.found_new) == (2, [4, 1, 3], 2)
    assert read(connection, since=timedelta(days=3_650)).runs == 3
    nothing = read(connection, since=FIRST_RUN + timedelta(days=9))
    assert (nothing.runs, nothing.drifted, nothing.status) == (0, 0, "none")


def test_the_tokens_of_each_cause_are_its_own_share(host: Host, connection: Connection, past: dict[str, int]) -> None:
    report = read(connection, past["run 2"])
    assert [(c.cause, c.drifts, c.inferred, c.tokens_overstated, c.tokens_understated) for c in report.causes] == [
        ("unexplained", 1, 0, 0, 7_000),
        ("credit_without_grant", 1, 0, 5_000, 0),
        ("missed_decrement", 1, 1, 80, 0),
        ("double_decrement", 1, 1, 0, 20),
    ]
    assert (report.tokens_explained, report.tokens_drifted) == (5_060, 12_060)
    assert (report.tokens_proven, report.tokens_inferred) == (0, 60)
    assert report.share_explained == pytest.approx(5_060 / 12_060)


def test_sizes_are_counted_by_their_digits_without_gaps(
    host: Host, connection: Connection, past: dict[str, int]
) -> None:
    add_drift(host, past["run 3"], 5, 9, 0)
    add_drift(host, past["run 3"], 6, 0, 10)
    add_drift(host, past["run 3"], 7, None, 0)
    report = read(connection, past["run 3"])
    assert [(s.at_least, s.overstated, s.understated) for s in report.sizes] == [
        (1, 1, 1),
        (10, 0, 1),
        (100, 0, 0),
        (1_000, 1, 0),
    ]


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (DriftFilter(causes=("missed_decrement",)), [2, 3]),
        (DriftFilter(causes=("double_decrement", "missed_decrement")), [3]),
        (DriftFilter(causes=("unexplained",)), [4]),
        (DriftFilter(min_tokens=300), [4, 1, 2]),
        (DriftFilter(user_id=3), [3]),
        (DriftFilter(user_id=3, min_tokens=61), []),
    ],
)
def test_a_filter_narrows_rows_and_figures_alike(
    host: Host, connection: Connection, past: dict[str, int], only: DriftFilter, found: list[int]
) -> None:
    report = read(connection, since=FIRST_RUN, only=only)
    assert users(report) == found
    assert report.drifted == len(found)
    assert report.tokens_drifted == sum(abs(row.drift) for row in report.rows)


def test_a_row_limit_keeps_the_largest_drifts(host: Host, connection: Connection, past: dict[str, int]) -> None:
    report = read(connection, since=FIRST_RUN, max_rows=2)
    assert (users(report), report.rows_left_out, report.drifted) == ([4, 1], 2, 4)


def test_rows_can_be_streamed(past: dict[str, int], in_one_transaction: Connection) -> None:
    source = find_source(in_one_transaction, "bigint", since=FIRST_RUN)
    assert source is not None
    assert [row.user_id for row in stream_rows(in_one_transaction, source)] == [4, 1, 2, 3]


@pytest.mark.parametrize(
    ("decision", "in_review", "set_aside"), [("accept", 0, 0), ("grant", 0, 0), ("ignore", 0, 1), ("undo", 1, 0)]
)
def test_a_decided_drift_is_no_longer_in_review(
    host: Host, connection: Connection, past: dict[str, int], decision: str, in_review: int, set_aside: int
) -> None:
    decide(host, past["credit"], decision)
    report = read(connection)
    assert (report.in_review, report.set_aside, report.rows[0].decision) == (in_review, set_aside, decision)


@pytest.mark.parametrize("action", ["tolerated", "ignored", "waiting"])
def test_drifts_that_need_no_decision_are_set_aside(host: Host, connection: Connection, action: str) -> None:
    add_drift(host, add_run(host), 1, 5, 0, action=action)
    report = read(connection)
    assert (report.drifted, report.set_aside, report.actions) == (1, 1, {action: 1})


def test_a_row_of_an_earlier_version_has_its_cause_counted(host: Host, connection: Connection) -> None:
    drift = add_drift(host, add_run(host), 1, 500, 0, ("missed_decrement", 500))
    host.execute("UPDATE trueup.drift SET evidence = '{\"original\": 9}' WHERE id = :id", id=drift)
    [cause] = read(connection).causes
    assert (cause.cause, cause.drifts, cause.tokens) == ("missed_decrement", 1, 500)


def test_a_run_that_does_not_exist_is_refused_by_name(host: Host, connection: Connection) -> None:
    with pytest.raises(NotFoundError, match="reconcile run 99 does not exist"):
        read_report(connection, "bigint", 99)


def test_a_dry_runs_report_finds_what_a_run_would(host: Host, connection: Connection, drifted: list[int]) -> None:
    dry = report_dry_run(reconcile(get_engine(), HostMapping(), dry_run=True, keep_findings=True))
    reconcile(get_engine(), HostMapping())
    stored = read(connection)
    assert (dry.run_id, dry.dry_run, dry.corrected) == (None, True, 0)
    names = ("checked", "drifted", "in_review")
    tokens = ("overstated", "understated", "explained", "proven", "inferred")
    for field in (*names, *(f"tokens_{name}" for name in tokens), "causes", "sizes"):
        assert getattr(dry, field) == getattr(stored, field), field
    assert [(row.user_id, row.observed, row.expected, row.cause) for row in dry.rows] == [
        (row.user_id, row.observed, row.expected, row.cause) for row in stored.rows
    ]
    assert {row.written for row in dry.rows} == {None}


def test_the_json_is_versioned_and_plain(host: Host, connection: Connection, drifted: list[int]) -> None:
    reconcile(get_engine(), HostMapping())
    content = json.loads(json.dumps(read(connection).as_json()))
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["finished_at"] >= content["started_at"]
    row = next(row for row in content["rows"] if row["user_id"] == drifted[0])
    subscription = str(host.value("SELECT id FROM billing_subscription WHERE user_id = :u", u=drifted[0]))
    assert (row["subscription_id"], row["observed"], row["expected"], row["drift"]) == (
        subscription,
        10_000,
        9_700,
        300,
    )
    assert (row["cause"], row["action"], row["written"]) == ("missed_decrement", "corrected", 9_700)
    assert [part["tokens"] for part in row["evidence"]["components"]] == [300]


def test_every_cause_and_action_has_a_description() -> None:
    assert set(get_args(Cause)) <= set(CAUSE_SENTENCES)
    assert set(ACTION_SENTENCES) == {"corrected", "reported", "review", "lost_race", "waiting", "tolerated", "ignored"}


def test_the_history_has_the_newest_runs_oldest_first(host: Host, connection: Connection, past: dict[str, int]) -> None:
    add_run(host, status="failed", error="the disk is full", tokens_overstated=60, tokens_understated=40)
    runs = read_history(connection, "bigint", limit=2)
    assert [run.id for run in runs] == [past["run 3"], past["run 3"] + 1]
    assert (runs[1].tokens_drifted, runs[1].share_explained, runs[1].error) == (100, 0, "the disk is full")
    assert (runs[0].share_explained, runs[0].seconds) == (None, 4.0)
    assert [run.id for run in read_history(connection, "bigint", up_to_run=past["run 2"])][-1] == past["run 2"]
    assert history_json(runs)["runs"][0]["run_id"] == past["run 3"]
    host.execute("UPDATE trueup.reconcile_run SET started_at = now() - interval '2 days' WHERE id < :id", id=runs[1].id)
    host.execute("UPDATE trueup.reconcile_run SET started_at = now() WHERE id = :id", id=runs[1].id)
    assert [run.id for run in read_history(connection, "bigint", since=datetime.now(UTC) - timedelta(days=1))] == [
        runs[1].id
    ]


def test_a_counter_that_drifts_is_explained_without_a_run_and_without_writing(
    host: Host, connection: Connection, drifted: list[int]
) -> None:
    before = host.value("SELECT xmin::text FROM billing_subscription WHERE user_id = :u", u=drifted[0])
    story = report_counter(connection, HostMapping(), drifted[0])
    assert (story.original, story.consumed, story.observed, story.expected, story.drift) == (
        *(10_000, 300, 10_000),
        *(9_700, 300),
    )
    assert story.finding is not None
    assert story.finding.explanation.cause == "missed_decrement"
    # observed = original - consumed + the components' tokens
    assert sum(part.tokens for part in story.finding.explanation.components) == 300
    assert host.value("SELECT xmin::text FROM billing_subscription WHERE user_id = :u", u=drifted[0]) == before
    assert host.value("SELECT count(*) FROM trueup.reconcile_run") == 0
    assert json.loads(json.dumps(story.as_json(), default=str))["cause"] == "missed_decrement"


def test_a_counters_past_drifts_are_reported_with_their_decisions(
    host: Host, connection: Connection, drifted: list[int]
) -> None:
    assert report_counter(connection, HostMapping(), drifted[3]).base.why == "the window began"
    run = add_run(host)
    drift = add_drift(host, run, drifted[2], 12_000, 10_000, ("credit_without_grant", 2_000), action="review")
    decide(host, drift, "accept")
    story = report_counter(connection, HostMapping(), drifted[2])
    assert [(row.drift_id, row.decision) for row in story.past] == [(drift, "accept")]
    assert [(d.decision, d.decided_by, d.note) for d in story.decisions] == [("accept", "sam", "asked the customer")]
    assert (story.base.at, story.base.why) == (story.decisions[0].decided_at, "a person decided about a drift")
    clean = report_counter(connection, HostMapping(), drifted[3])
    assert (clean.finding, clean.drift, clean.base.at, clean.base.why) == (
        *(None, 0, FIRST_RUN),
        "a run over all users found no drift",
    )


def test_the_json_schema_knows_the_same_causes_and_actions() -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs" / "drift-report.schema.json").read_text())
    assert set(schema["$defs"]["cause"]["enum"]) == set(get_args(Cause))
    assert set(schema["$defs"]["action"]["enum"]) == set(ACTION_SENTENCES)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert set(schema["required"]) == set(schema["properties"])
    row = schema["$defs"]["row"]
    assert set(row["required"]) == set(row["properties"]) == {field.name for field in fields(ReportRow)}
