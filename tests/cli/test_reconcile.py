"""`trueup reconcile` and `trueup drift report`: the same report, when it is made and later."""

import csv
import io
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import TRUEUP, trueup, trueup_json
from tests.reconcile.test_shards import let_leases_run_out
from tests.support.books import dump
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for


def drifted(host: Host, tokens: int = 300) -> int:
    """A user whose counter has missed a decrement."""
    user = host.subscriber(1_000)
    host.log(user, tokens)
    return user


def test_reconcile_corrects_the_counters_and_reports_why(host: Host) -> None:
    user = drifted(host)
    output = trueup("reconcile").stdout
    assert host.counter(user) == 700
    for word in ("missed decrement", "corrected", "1,000", "700"):
        assert word in output


def test_a_dry_run_reports_the_same_and_writes_nothing_at_all(host: Host) -> None:
    user = drifted(host)
    before = dump(host)
    report = trueup_json("reconcile", "--dry-run")
    assert dump(host) == before
    assert (report["run_id"], report["dry_run"], report["drifted"], report["corrected"]) == (None, True, 1, 0)
    [row] = report["rows"]
    assert (row["user_id"], row["drift"], row["cause"], row["action"]) == (user, 300, "missed_decrement", "reported")
    assert "dry run, nothing was written" in trueup("reconcile", "--dry-run").stdout
    assert host.counter(user) == 1_000


def test_reconciling_one_user_leaves_the_others_alone(host: Host) -> None:
    one, other = drifted(host), drifted(host)
    assert trueup_json("reconcile", "--user", one)["checked"] == 1
    assert (host.counter(one), host.counter(other)) == (700, 1_000)


def test_drift_fails_the_command_only_when_asked_to(host: Host) -> None:
    drifted(host)
    trueup("reconcile", "--dry-run")
    trueup("reconcile", "--dry-run", "--fail-on-drift", code=3)
    trueup("reconcile", "--fail-on-drift", code=3)
    assert trueup_json("reconcile", "--fail-on-drift")["drifted"] == 0


def test_a_long_report_is_cut_and_says_where_the_rest_is(host: Host) -> None:
    for _ in range(22):
        drifted(host)
    assert "and 2 smaller drifts: `trueup drift report --run 1 --rows all`" in trueup("reconcile").stdout
    assert trueup("drift", "report", "--run", 1).stdout.count("missed decrement") > 22


def test_a_cut_dry_run_does_not_name_a_run_that_is_not_kept(host: Host) -> None:
    for _ in range(22):
        drifted(host)
    output = trueup("reconcile", "--dry-run").stdout
    assert "--run None" not in output
    assert "and 2 smaller drifts: `trueup reconcile --dry-run --json`" in output


def test_the_report_of_a_run_is_the_same_in_every_form(host: Host) -> None:
    user = drifted(host)
    made = trueup_json("reconcile")
    read = trueup_json("drift", "report")
    assert read == made
    assert json.loads(trueup("drift", "report", "--format", "json").stdout) == made
    [row] = csv.DictReader(io.StringIO(trueup("drift", "report", "--format", "csv").stdout))
    assert (row["user_id"], row["observed"], row["expected"], row["written"]) == (str(user), "1000", "700", "700")
    assert json.loads(row["evidence"]) == made["rows"][0]["evidence"]
    assert "missed decrement" in trueup("drift", "report").stdout


def test_the_newest_run_is_shown_unless_another_is_named(host: Host) -> None:
    drifted(host)
    first, second = trueup_json("reconcile"), trueup_json("reconcile")
    assert trueup_json("drift", "report")["run_id"] == second["run_id"]
    assert trueup_json("drift", "report", "--run", first["run_id"]) == first


def test_before_any_run_the_report_names_the_remedy(database: str) -> None:
    assert "Start one with `trueup reconcile`" in trueup("drift", "report", code=1).stderr


@pytest.mark.parametrize(("run", "code"), [("7", 1), ("0", 2), ("x", 2)])
def test_a_run_that_does_not_exist_is_named(database: str, run: str, code: int) -> None:
    assert "run" in trueup("drift", "report", "--run", run, code=code).stderr


def test_an_unknown_format_is_wrong_usage(database: str) -> None:
    assert "'table', 'json', 'csv'" in trueup("drift", "report", "--format", "xml", code=2).stderr


def test_options_change_the_rules_of_one_run(host: Host) -> None:
    small, large = drifted(host, 20), drifted(host, 300)
    for _ in range(2):
        report = trueup_json("reconcile", "--max-correction", 100, "--tolerance", 30)
        assert {row["user_id"]: row["action"] for row in report["rows"]} == {small: "tolerated", large: "review"}
    trueup("reconcile", "--tolerance", -1, code=2)
    trueup("reconcile", "--max-correction", "many", code=2)
    assert (host.counter(small), host.counter(large)) == (1_000, 1_000)
    report = trueup_json("reconcile", "--batch-size", 1)
    # What was held for a person stays held.
    assert {row["user_id"]: row["action"] for row in report["rows"]} == {small: "corrected", large: "review"}


def test_drift_that_is_set_aside_does_not_fail_the_command(host: Host) -> None:
    drifted(host, 20)
    trueup("reconcile", "--tolerance", 30, "--fail-on-drift")


def test_a_deep_pass_shows_its_defects_and_fails_the_command_when_asked_to(host: Host) -> None:
    user = drifted(host)
    trueup("reconcile")
    host.execute("UPDATE trueup.balance SET consumed = 5, held = 9")
    before = dump(host)
    assert "balance untrue" in trueup("reconcile", "--deep", "--dry-run").stdout
    assert trueup_json("reconcile", "--deep", "--dry-run", "--fail-on-drift", code=3)["defects"] == 2
    assert dump(host) == before
    output = trueup("reconcile", "--deep", "--fail-on-drift", code=3).stdout
    for word in ("balance untrue", "held untrue", str(user), "yes"):
        assert word in output
    assert trueup_json("reconcile", "--deep", "--fail-on-drift")["defects"] == 0


def test_a_deep_pass_of_one_user_is_wrong_usage(host: Host) -> None:
    assert "leave out --user" in trueup("reconcile", "--deep", "--user", 1, code=2).stderr


def test_several_jobs_have_the_result_of_one(host: Host) -> None:
    users = [drifted(host) for _ in range(5)]
    assert trueup_json("reconcile", "--jobs", 3)["corrected"] == 5
    assert [host.counter(user) for user in users] == [700] * 5
    trueup("reconcile", "--jobs", 0, code=2)


@contextmanager
def slow_run(host: Host) -> Iterator[subprocess.Popen[str]]:
    """Give a run with several jobs that is slow at correcting, and at work."""
    host.execute(
        "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END $$"
    )
    host.execute("CREATE TRIGGER slow BEFORE INSERT ON trueup.drift FOR EACH ROW EXECUTE FUNCTION public.slow()")
    command = [TRUEUP, "reconcile", "--batch-size", "1", "--jobs", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: host.value("SELECT count(*) FROM trueup.drift") >= 3, "it is at work")
            yield process
        finally:
            process.kill()


def assert_next_run_resumes(host: Host, users: list[int]) -> None:
    assert host.value("SELECT count(*) FROM trueup.drift") < len(users), "it was at work"
    host.execute("DROP TRIGGER slow ON trueup.drift")
    let_leases_run_out(host)
    assert "Resumed run 1" in trueup("reconcile").stdout
    assert [host.counter(user) for user in users] == [700] * len(users)
    assert host.value("SELECT count(DISTINCT user_id) = count(*) AND count(*) = :n FROM trueup.drift", n=len(users))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_its_jobs_end_after_their_batches_and_the_next_run_resumes(host: Host, how: signal.Signals) -> None:
    users = [drifted(host) for _ in range(60)]
    with slow_run(host) as process:
        process.send_signal(how)
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "the next `trueup reconcile` resumes" in errors
    assert "Traceback" not in errors
    assert host.value("SELECT status FROM trueup.reconcile_run") == "interrupted"
    assert host.value("SELECT count(*) FROM trueup.reconcile_shard WHERE status = 'running'") == 0
    assert_next_run_resumes(host, users)


def test_the_run_after_a_killed_run_resumes_it(host: Host) -> None:
    users = [drifted(host) for _ in range(60)]
    with slow_run(host) as process:
        process.kill()
    assert host.value("SELECT status FROM trueup.reconcile_run") == "running"
    assert_next_run_resumes(host, users)


def test_with_several_jobs_the_report_is_the_same(host: Host) -> None:
    """For a dry run, and for a run that corrects."""
    host.execute("INSERT INTO accounts_user SELECT i, i, '' FROM generate_series(1, 2400) i")
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
        "SELECT i, i, :plan, now() - interval '9 days', 1000 + i FROM generate_series(1, 2400) i",
        plan=host.plan(1_000),
    )
    reports = [trueup_json("reconcile", "--dry-run", "--batch-size", 100, *jobs) for jobs in ((), ("--jobs", 3))]
    for report in reports:
        assert (report["checked"], report["drifted"]) == (2400, 2400)
        report["rows"].sort(key=lambda row: row["user_id"])
        for moment in ("started_at", "finished_at"):
            del report[moment]
        for row in report["rows"]:
            del row["found_at"]
    assert reports[0] == reports[1]
    report = trueup_json("reconcile", "--jobs", 3, "--batch-size", 100)
    assert (report["status"], report["checked"], report["drifted"]) == ("finished", 2400, 2400)
