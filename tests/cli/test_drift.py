"""`trueup drift report`, `history` and `explain`."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.cli.conftest import trueup, trueup_json
from tests.support.drift_history import FIRST_RUN, add_drift, add_run, decide, see_again
from tests.support.host import Host
from tests.support.schemas import complaints
from trueup.cli.options import SINCE
from trueup.cli.output import write_file
from trueup.cli.reports.terminal import sparkline
from trueup.errors import ServiceUnavailableError

pytestmark = pytest.mark.dated

SCHEMA = "drift-report.schema.json"


@pytest.fixture
def past(host: Host) -> list[int]:
    """Two runs: a missed decrement that was corrected, then a credit in review that stands."""
    runs = [add_run(host, checked=50, tokens_overstated=5_300), add_run(host, checked=51, tokens_overstated=5_000)]
    credit = add_drift(host, runs[0], 1, 15_000, 10_000, ("credit_without_grant", 5_000), action="review")
    add_drift(host, runs[0], 2, 900, 600, ("missed_decrement", 300))
    see_again(host, credit, runs[1])
    return [credit, *runs]


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_the_report_shows_summary_causes_and_rows(past: list[int]) -> None:
    shown = trueup("drift", "report", "--run", past[1]).stdout
    for line in (
        "counters checked    50",
        "drifted             2",
        "in review           1",
        "tokens explained    100 %: 0 % proven, 0 % inferred",
    ):
        assert line in shown
    assert ["credit without grant", "1", "0", "0", "5,000", "0"] in table(shown)
    assert ["2", "900", "600", "300", "missed decrement", "possible", "corrected", "600"] in table(shown)


def test_without_a_run_the_report_says_how_to_start_one(database: str) -> None:
    assert "Start one with `trueup reconcile`" in trueup("drift", "report", code=1).stderr
    assert "reconcile run 7 does not exist" in trueup("drift", "report", "--run", 7, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "users"),
    [
        (("--since", "2024-11-01"), [1, 2]),
        (("--since", "2024-11-03T00:00"), [1]),
        (("--since", "2024-11-03T03:00+02:00"), [1]),
        (("--since", "500w"), [1, 2]),
        (("--since", "2024-11-01", "--cause", "missed-decrement"), [2]),
        (("--since", "2024-11-01", "--cause", "credit_without_grant + missed_decrement"), []),
        (("--since", "2024-11-01", "--min", "301"), [1]),
        (("--since", "2024-11-01", "--user", "2"), [2]),
        (("--since", "2024-11-01", "--rows", "1"), [1]),
        (("--run", "1"), [1, 2]),
        ((), [1]),
    ],
)
def test_the_options_select_the_drifts(past: list[int], arguments: tuple[str, ...], users: list[int]) -> None:
    assert [row["user_id"] for row in trueup_json("drift", "report", *arguments)["rows"]] == users


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--since", "yesterday"), "Invalid value for '--since': 'yesterday' is no time: give 2026-11-01"),
        (("--since", "2999-01-01"), "Invalid value for '--since': '2999-01-01' is in the future"),
        (("--since", "2024-13-01"), "Invalid value for '--since'"),
        (("--since", "99999w"), "Invalid value for '--since'"),
        (("--cause", "missed_decremnt"), "Did you mean missed_decrement?"),
        (("--cause", ""), "Invalid value for '--cause'"),
        (("--min", "-1"), "Invalid value for '--min'"),
        (("--min", "1e3"), "Invalid value for '--min'"),
        (("--user", "x"), "Invalid value for '--user'"),
        (
            ("--rows", "many"),
            """Invalid value for '--rows' / '--limit': 'many' is no count of rows: give a whole number, or "all\"""",
        ),
        (("--run", "0"), "Invalid value for '--run'"),
        (("--run", "1", "--since", "1d"), "--run and --since exclude each other"),
        (("--format", "xml"), "Invalid value for '--format'"),
        (("--output", "drift.txt"), "--output: a table is for the terminal"),
        (("--output", "."), "Invalid value for '--output'"),
    ],
)
def test_bad_input_is_refused_by_the_options_name(past: list[int], arguments: tuple[str, ...], said: str) -> None:
    assert said in trueup("drift", "report", *arguments, code=2).stderr


def test_the_exit_code_reports_drift_only_on_request_and_ignores_drift_that_is_set_aside(
    host: Host, past: list[int]
) -> None:
    trueup("drift", "report")
    trueup("drift", "report", "--fail-on-drift", code=3)
    trueup("drift", "report", "--fail-on-drift", "--min", 9_999)
    decide(host, past[0], "ignore")
    trueup("drift", "report", "--fail-on-drift")


def test_the_json_is_as_its_schema_says(host: Host, past: list[int]) -> None:
    run = add_run(host, status="running", finished_at=None)
    add_drift(host, run, 3, None, 7, action="lost_race", certainty="possible")
    add_drift(host, run, 4, 90, 60, ("missed_decrement", 50), ("double_decrement", -20))
    user = host.subscriber(10_000)
    host.log(user, 300)
    for arguments in (
        ("drift", "report"),
        ("drift", "report", "--since", "2024-11-01", "--cause", "missed_decrement"),
        ("drift", "report", "--rows", "1"),
        ("drift", "report", "--since", "1m"),
        ("reconcile", "--dry-run"),
        ("reconcile",),
    ):
        report = json.loads(trueup(*arguments, "--json").stdout)
        assert complaints(report, SCHEMA) == [], arguments
    wrong = json.loads(trueup("drift", "report", "--json").stdout)
    wrong["rows"][0]["action"] = "forgotten"
    assert complaints(wrong, SCHEMA) != []


def test_a_spreadsheet_runs_no_cell_of_the_csv(host: Host, past: list[int]) -> None:
    add_drift(host, past[2], 3, 5, 9, action="reported", reason="=cmd|' /C calc'!A0")
    rows = list(csv.DictReader(io.StringIO(trueup("drift", "report", "--format", "csv", "--user", 3).stdout)))
    assert [(row["user_id"], row["drift"], row["reason"]) for row in rows] == [("3", "-4", "'=cmd|' /C calc'!A0")]
    assert json.loads(rows[0]["evidence"]) == {"components": []}


def test_texts_of_the_host_do_not_break_the_markdown(host: Host, past: list[int]) -> None:
    shown = trueup("drift", "report", "--format", "markdown").stdout
    assert "| 1 | 15,000 | 10,000 | 5,000 | credit without grant | possible | review |" in shown
    for line in shown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


@pytest.mark.parametrize(
    ("name", "starts"), [("d.json", "{"), ("d.csv", "drift_id,"), ("d.md", "# Drift"), ("d.HTML", "<!doctype html>")]
)
def test_a_file_gets_the_format_of_its_name(past: list[int], tmp_path: Path, name: str, starts: str) -> None:
    file = tmp_path / name
    file.write_text("old")
    assert trueup("drift", "report", "--output", file).stdout.strip() == f"Written to {file}."
    assert file.read_text().startswith(starts)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_cant_be_written_is_an_error_and_leaves_nothing(past: list[int], tmp_path: Path) -> None:
    result = trueup("drift", "report", "--output", tmp_path / "no" / "d.csv", code=1)
    assert "--output:" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_cut_short_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text("old")

    def broken() -> Iterator[str]:
        yield "new"
        raise ServiceUnavailableError("PostgreSQL", "db", "it has gone")

    with pytest.raises(ServiceUnavailableError):
        write_file(file, broken())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("d.csv", "old")]


def test_a_time_without_an_offset_is_utc_wherever_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tehran")
    time.tzset()
    try:
        assert SINCE.convert("2024-11-01T08:30", None, None) == datetime(2024, 11, 1, 8, 30, tzinfo=UTC)
        assert SINCE.convert("2024-11-01T08:30+03:30", None, None) == datetime(2024, 11, 1, 5, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_run_that_ended_in_an_error_and_one_over_one_user_stand_in_the_history(host: Host, past: list[int]) -> None:
    add_run(host, only_user="7", tokens_overstated=10**9)
    add_run(host, status="failed", error="the disk is full")
    shown = trueup("drift", "history").stdout
    assert "drifted tokens  ██  5,300 → 5,000, at most 5,300" in shown.replace("█▇", "██")
    assert "user 7" in shown
    assert "run 4 failed: the disk is full" in shown
    assert [run["run_id"] for run in trueup_json("drift", "history", "--limit", 2)["runs"]] == [3, 4]
    lines = trueup("drift", "history", "--format", "csv").stdout.splitlines()
    assert lines[0].startswith("run_id,kind,")
    assert len(lines) == 5


def test_a_history_without_runs_says_so(host: Host) -> None:
    assert "no reconcile run" in trueup("drift", "history").stdout
    assert trueup_json("drift", "history")["runs"] == []
    add_run(host, started_at=FIRST_RUN.replace(year=2020))
    assert "no reconcile run" in trueup("drift", "history", "--since", "1d").stdout


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([0, 0], "▁▁"), ([1], "█"), ([0, 50, 100], "▁▅█"), ([1, 10_000], "▂█"), ([7, 7], "██")],
)
def test_a_sparkline_shows_every_value_above_zero(values: list[int], line: str) -> None:
    assert sparkline(values) == line


def test_a_counter_is_explained_by_a_sum_that_can_be_checked(host: Host) -> None:
    user = host.subscriber(10_000)
    host.log(user, 300)
    shown = trueup("drift", "explain", user).stdout
    for line in ("original (plan and grants)  10,000", "= left                       9,700", "+ missed decrement"):
        assert line in shown
    assert "The counter shows 300 tokens that are used up." in shown
    assert "the host logged usage, but did not subtract it from the counter" in shown
    assert "A run now would set the counter to 9,700 (" in shown
    story = trueup_json("drift", "explain", user)
    assert (story["drift"], story["cause"], story["observed"], story["expected"]) == (
        300,
        "missed_decrement",
        10_000,
        9_700,
    )


def test_a_surplus_of_a_plans_size_is_never_called_used_up(host: Host) -> None:
    user = host.subscriber(10_000, counter=15_000)
    host.plan(5_000)
    shown = trueup("drift", "explain", user).stdout
    said = "The counter shows 5,000 tokens more than plan, grants and usage leave; they may be paid. "
    assert said + "This is the size of the plan 'token 5000'." in shown
    assert "used up" not in shown
    assert trueup_json("drift", "explain", user)["plans_of_this_size"] == {"5000": ["token 5000"]}


def test_a_right_counter_is_reported_as_right(host: Host) -> None:
    assert "The counter is right" in trueup("drift", "explain", host.subscriber(10_000)).stdout


def test_a_user_without_a_subscription_has_only_a_past(host: Host, past: list[int]) -> None:
    decide(host, past[0], "accept")
    shown = trueup("drift", "explain", 1).stdout
    assert "no subscription any more" in shown
    assert "asked the customer" in shown
    assert "user: 999 has no subscription" in trueup("drift", "explain", 999, code=1).stderr


def test_a_terminal_obeys_nothing_that_a_host_wrote(host: Host, settings: Callable[..., None], past: list[int]) -> None:
    host.execute("UPDATE trueup.drift SET reason = E'\\x1b[31mred' WHERE user_id = 1")
    add_run(host, only_user="\x1b]0;title\x07", status="failed", error="x\x1b[2J")
    for arguments in (("drift", "history"), ("drift", "explain", 1), ("drift", "report", "--format", "markdown")):
        assert "\x1b" not in trueup(*arguments).stdout
