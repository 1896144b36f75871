"""The doctor's findings: each fault, with a remedy that works, and none in a healthy database."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.standby import standby_of
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect
from trueup.doctor import database as doctor
from trueup.doctor.clocks import HARMFUL_SECONDS, Offset, judge, measure
from trueup.doctor.database import check_durability, check_server
from trueup.doctor.findings import Finding, error, exit_code, ok, run_check, warning
from trueup.doctor.installation import check_functions, check_rights, check_schema, check_triggers
from trueup.doctor.invariants import (
    check_beat,
    check_holds,
    check_invariants,
    check_owed_charges,
    check_runs,
    check_unresolved,
)
from trueup.doctor.settings import check_settings
from trueup.doctor.versions import check_packages, check_python, check_weaker_versions
from trueup.host.mapping import HostMapping
from trueup.install.install import expected_functions, install
from trueup.settings.settings import Settings, get_settings

Check = Callable[[Connection, Settings], Iterator[Finding]]


def found(check: Check, connection: Connection) -> list[Finding]:
    return list(check(connection, get_settings()))


def only(check: Check, connection: Connection) -> Finding:
    [finding] = found(check, connection)
    return finding


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def set_up(host: Host, mapping: HostMapping | None = None) -> None:
    with host.engine.begin() as connection:
        install(connection, mapping or HostMapping(), with_host_tables=False)


def mapped(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"TRUEUP_HOST__{name}", value)
    get_settings.cache_clear()


def test_a_fresh_database_has_nothing_wrong_with_it(host: Host) -> None:
    charge_tokens_of(host)
    host.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # PostgreSQL 14 grants it
    findings = doctor.examine_database(get_settings())
    told = [finding for finding in findings if finding.level != "ok"]
    # The tests' role is a superuser.
    assert [(finding.check, finding.level) for finding in told] == [("rights", "warning")]
    assert {finding.check for finding in findings} >= {name for name, _ in (*doctor._ALWAYS, *doctor._INSTALLED)}


def charge_tokens_of(host: Host) -> int:
    user = host.subscriber(1_000)
    host.log(user, 20)
    with connect() as connection:
        charge_tokens(connection, hold_tokens(connection, user, 300), 100)
    return user


def test_a_failed_check_hides_no_other_check(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(connection: Connection, settings: Settings) -> Iterator[Finding]:
        yield ok("a", "fine so far")
        connection.execute(text("SELECT * FROM nowhere"))

    def slow(connection: Connection, settings: Settings) -> Iterator[Finding]:
        connection.execute(text("SELECT pg_sleep(30)"))
        yield ok("b", "never said")

    def gone(connection: Connection, settings: Settings) -> Iterator[Finding]:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        yield ok("d", "never said")

    def fine(connection: Connection, settings: Settings) -> Iterator[Finding]:
        yield ok("c", f"{connection.scalar(text('SELECT 1'))}")

    monkeypatch.setattr(doctor, "STATEMENT_SECONDS", 1)
    monkeypatch.setattr(doctor, "_ALWAYS", (("a", broken), ("b", slow), ("c", fine), ("d", gone), ("c", fine)))
    monkeypatch.setattr(doctor, "_INSTALLED", ())
    findings = doctor.examine_database(get_settings())
    assert [(finding.check, finding.level) for finding in findings] == [
        ("a", "ok"),
        ("a", "error"),
        ("b", "warning"),
        ("c", "ok"),
        ("d", "error"),
        ("c", "warning"),
    ]
    assert '"nowhere" does not exist' in findings[1].what
    assert "SELECT" not in findings[1].what
    assert "took too long" in findings[2].what


def test_a_database_that_does_not_answer_is_one_finding(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://app:hunter2@127.0.0.1:1/app")
    get_settings.cache_clear()
    [finding] = doctor.examine_database(get_settings())
    assert (finding.check, finding.level) == ("database", "error")
    assert "127.0.0.1:1/app" in finding.what
    assert "hunter2" not in finding.what


@pytest.mark.parametrize(
    ("levels_found", "strict", "code"),
    [("", False, 0), ("ok", True, 0), ("warning", False, 0), ("warning", True, 1), ("error ok", False, 1)],
)
def test_errors_end_with_one_and_warnings_only_when_asked(levels_found: str, strict: bool, code: int) -> None:
    made = {"ok": ok("x", "x"), "warning": warning("x", "x", "y"), "error": error("x", "x", "y")}
    assert exit_code([made[level] for level in levels_found.split()], strict=strict) == code


# -- settings and versions


@pytest.mark.parametrize(
    ("values", "level", "told"),
    [
        ({"visibility_timeout_seconds": 600}, "warning", "TRUEUP_VISIBILITY_TIMEOUT_SECONDS"),
        ({"model_timeout_seconds": 600.0, "model_max_retries": 3}, "warning", "TRUEUP_HOLD_TTL_SECONDS"),
        ({"task_time_limit_seconds": 60, "model_max_retries": 1}, "warning", "TRUEUP_TASK_TIME_LIMIT_SECONDS"),
        ({"reconcile_deep_interval_seconds": 0}, "warning", "TRUEUP_RECONCILE_DEEP_INTERVAL_SECONDS"),
        (
            {"database_url": "postgresql://db/app", "model_provider": "openai", "openai_api_key": "k"},
            "warning",
            "BROKER",
        ),
        ({"model_provider": "openai"}, "error", "TRUEUP_OPENAI_API_KEY"),
        ({"database_url": "postgresql://db/app", "broker_url": "redis://r"}, "warning", "TRUEUP_MODEL_PROVIDER"),
        (
            {"database_url": "postgresql://db/app", "broker_url": "redis://r", "model_provider": "offline"},
            "warning",
            "TRUEUP_MODEL_PROVIDER=openai, or unset it",
        ),
    ],
)
def test_dangerous_combinations_of_settings_are_reported(values: dict[str, Any], level: str, told: str) -> None:
    findings = list(check_settings(Settings(**values)))
    assert any(finding.level == level and told in (finding.remedy or "") for finding in findings)


def test_the_default_settings_endanger_nothing() -> None:
    assert levels(list(check_settings(Settings()))) == {"settings": "ok"}


def test_the_installed_packages_meet_the_requirements() -> None:
    assert levels([*check_python(), *check_packages()]) == {"python": "ok", "packages": "ok"}


@pytest.mark.parametrize(
    ("demand", "told"),
    [
        ("celery>=99,<100", "trueup requires >=99,<100"),
        ("celery>=1,<5.7", "celery has version"),
        ("no-such-package>=1", "no-such-package is not installed"),
        ("psycopg[binary]>=99", "psycopg has version"),
    ],
)
def test_a_package_of_another_version_is_named(demand: str, told: str) -> None:
    [finding] = check_packages([demand, "nothing>=1; python_version < '3'"])
    assert finding.level == "error"
    assert told in finding.what


@pytest.mark.parametrize("celery", ["5.5.0", "5.6.3"])
def test_an_older_celery_is_named_with_the_consequence(celery: str) -> None:
    [finding] = check_weaker_versions({"celery": celery})
    assert (finding.level, finding.check) == ("warning", "packages")
    assert f"With celery {celery} a metered task whose process is killed is not retried" in finding.what
    assert "celery 5.7" in (finding.remedy or "")


@pytest.mark.parametrize("installed", [{}, {"celery": "5.7.0"}, {"celery": "5.10.1"}])
def test_a_version_that_lacks_nothing_is_not_named(installed: dict[str, str]) -> None:
    assert list(check_weaker_versions(installed)) == []


# -- clocks


def test_half_of_the_round_trip_is_subtracted_and_the_quickest_answer_counts() -> None:
    started = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 38.0, 40.0, 47.0])
    told = iter([1004.5, 1001.0, 1003.5, 1004.0, 1003.5])
    offset = measure(lambda: next(told), clock=lambda: 1000.0, stopwatch=lambda: next(started))
    assert offset == Offset(seconds=3.0, uncertainty=0.5)


@pytest.mark.parametrize(
    ("seconds", "uncertainty", "level"),
    [(1.9, 0, "ok"), (-2.0, 0, "warning"), (3.0, 1.5, "ok"), (HARMFUL_SECONDS, 0, "error"), (-99, 60, "warning")],
)
def test_only_a_difference_that_the_round_trip_does_not_explain_counts(
    seconds: float, uncertainty: float, level: str
) -> None:
    [finding] = judge("clock", "The clocks", Offset(seconds=seconds, uncertainty=uncertainty))
    assert finding.level == level


def test_two_clocks_are_compared_by_way_of_ours() -> None:
    ahead, behind = Offset(seconds=5, uncertainty=0.1), Offset(seconds=-2, uncertainty=0.2)
    assert ahead.against(behind) == Offset(seconds=7, uncertainty=pytest.approx(0.3))


# -- the server


def test_a_server_that_takes_no_writes_is_an_error(host: Host, connection: Connection) -> None:
    assert levels(found(check_server, connection)) == {"postgres": "ok"}
    connection.execute(text("SET default_transaction_read_only = on"))
    assert [finding.level for finding in found(check_server, connection)] == ["ok", "error"]


def test_a_server_that_may_lose_commits_is_reported(host: Host, connection: Connection) -> None:
    connection.execute(text("SET synchronous_commit = off"))
    assert "warning" in [finding.level for finding in found(check_durability, connection)]


def test_standbys_of_which_none_is_synchronous_are_told(host: Host, connection: Connection) -> None:
    """A failover to one of them may lose a hold, and what was promised by it."""
    assert only(check_durability, connection).level == "ok"
    with standby_of(host.engine):
        wait_for(lambda: host.value("SELECT count(*) FROM pg_stat_replication") == 1)
        told = [finding for finding in found(check_durability, connection) if finding.level == "warning"]
    assert [finding.detail for finding in told] == [{"standbys": 1}]
    assert "synchronous_standby_names" in str(told[0].remedy)


def test_a_limit_on_temporary_files_is_told(host: Host, connection: Connection) -> None:
    name = host.value("SELECT current_database()")
    host.execute(f"ALTER DATABASE {name} SET temp_file_limit = '10MB'")
    told = [finding for finding in found(check_durability, connection) if finding.level == "warning"]
    assert [finding.detail for finding in told] == [{"limits": ["temp_file_limit=10MB"]}]


# -- trueup's own objects


def test_a_database_without_trueup_says_so_and_no_more(empty_database: str) -> None:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, HostMapping(), with_host_tables=True)
        connection.execute(text("DROP SCHEMA trueup CASCADE"))
    engine.dispose()
    findings = doctor.examine_database(get_settings())
    [failed] = [finding for finding in findings if finding.level == "error"]
    assert failed.check == "schema"
    assert "trueup db attach" in str(failed.remedy)


def test_a_schema_of_another_version_is_reported(host: Host, connection: Connection) -> None:
    assert only(check_schema, connection).level == "ok"
    host.execute("UPDATE trueup.alembic_version SET version_num = 'layout_99'")
    assert "version layout_99, the code has version" in only(check_schema, connection).what


def test_every_function_is_known_with_its_body(host: Host) -> None:
    there = host.value("SELECT count(*) FROM pg_proc WHERE pronamespace = to_regnamespace('trueup')")
    assert expected_functions(HostMapping()).total() == there > 50


def test_functions_of_another_version_are_named_and_a_setup_replaces_them(host: Host, connection: Connection) -> None:
    assert only(check_functions, connection).level == "ok"
    host.execute(
        "CREATE OR REPLACE FUNCTION trueup.log_epoch() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT CAST(0 AS bigint)'"
    )
    host.execute(
        "DROP FUNCTION trueup.plan_sizes(); CREATE FUNCTION trueup.old_one() RETURNS int LANGUAGE sql AS 'SELECT 1'"
    )
    assert only(check_functions, connection).detail["functions"] == ["log_epoch", "old_one", "plan_sizes"]
    set_up(host)
    assert only(check_functions, connection).level == "ok"


def test_a_setup_for_another_mapping_is_reported(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped(monkeypatch, USER__EMAIL="mail")
    assert "set up for other" in only(check_functions, connection).what


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted", "disabled"),
        ("ALTER TABLE ai_usage_log ENABLE REPLICA TRIGGER trueup_inserted", "enabled for replication alone"),
        ("DROP TRIGGER trueup_inserted ON ai_usage_log", "missing"),
    ],
)
def test_a_trigger_that_does_not_fire_is_named_and_its_remedy_counts_the_missed_rows(
    host: Host, connection: Connection, change: str, state: str
) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 0)
    assert only(check_triggers, connection).level == "ok"
    host.execute(change)
    host.log(user, 400)
    finding = only(check_triggers, connection)
    assert (finding.level, finding.detail) == ("error", {"trigger": "trueup_inserted", "state": state})
    assert "trueup db attach" in str(finding.remedy)
    set_up(host)
    assert only(check_triggers, connection).level == "ok"
    hold_tokens(connection, user, 600)
    assert_true(host)


def test_a_missing_window_trigger_is_reported_too(host: Host, connection: Connection) -> None:
    host.execute("DROP TRIGGER trueup_window_changed ON billing_subscription")
    finding = only(check_triggers, connection)
    assert (finding.level, finding.detail) == ("error", {"trigger": "trueup_window_changed", "state": "missing"})
    set_up(host)
    assert only(check_triggers, connection).level == "ok"


def test_a_log_that_was_renamed_with_its_triggers_is_reported(host: Host, connection: Connection) -> None:
    host.execute("ALTER TABLE ai_usage_log RENAME TO log_2025; CREATE TABLE ai_usage_log (LIKE log_2025)")
    findings = found(check_triggers, connection)
    assert [finding.level for finding in findings] == ["error"] * 4 + ["warning"]
    assert findings[-1].detail == {"table": "public.log_2025"}


def test_a_role_whose_sessions_fire_no_trigger_is_named(host: Host, connection: Connection) -> None:
    name = host.value("SELECT current_database()")
    host.execute(f"ALTER DATABASE {name} SET session_replication_role = replica")
    finding = only(check_triggers, connection)
    assert finding.detail == {"who": "all roles"}


def test_the_tests_own_role_lacks_nothing(host: Host, connection: Connection) -> None:
    assert only(check_rights, connection).detail == {"role": "postgres"}


# -- the books


def test_old_and_overdue_holds_are_reported(host: Host, connection: Connection) -> None:
    hold_tokens(connection, host.subscriber(), 100)
    assert only(check_holds, connection).level == "ok"
    host.execute("UPDATE trueup.hold SET opened_at = now() - interval '2 days'")
    assert "open for 48 hours" in only(check_holds, connection).what
    host.execute("UPDATE trueup.hold SET expires_at = now() - interval '1 hour'")
    assert only(check_holds, connection).detail["overdue"] == 1


def test_calls_and_messages_with_an_unknown_outcome_are_counted(host: Host, connection: Connection) -> None:
    assert levels(found(check_unresolved, connection)) == {"calls": "ok", "messages": "ok"}
    user = host.subscriber()
    host.execute("INSERT INTO trueup.call_intent VALUES (:user, 't', '1', 1, 700, 'unknown', now()); ", user=user)
    host.execute("INSERT INTO trueup.outbox VALUES (:user, 't', 'dm', 'unknown', '{}', now(), now())", user=user)
    calls, messages = found(check_unresolved, connection)
    assert (calls.level, calls.detail) == ("warning", {"calls": 1, "tokens_bound": 700})
    assert (messages.level, messages.detail) == ("warning", {"messages": 1})


def test_owed_charges_are_an_error_with_the_reason(host: Host, connection: Connection) -> None:
    assert only(check_owed_charges, connection).level == "ok"
    hold = hold_tokens(connection, host.subscriber(), 1_000)
    host.execute("ALTER TABLE ai_usage_log ADD CONSTRAINT small CHECK (total_tokens < 10)")
    charge_tokens(connection, hold, 700)
    finding = only(check_owed_charges, connection)
    assert (finding.level, finding.detail) == ("error", {"charges": 1, "tokens": 700})
    assert "23514" in finding.what
    assert "small" in finding.what


def add_run(host: Host, status: str, *, hours: float, **more: Any) -> None:
    values = {"kind": "'quick'", "dry_run": "false", "status": f"'{status}'", **more}
    columns, given = ", ".join(values), ", ".join(map(str, values.values()))
    at = f"now() - interval '{hours} hours'"
    host.execute(
        f"INSERT INTO trueup.reconcile_run ({columns}, started_at, finished_at) VALUES ({given}, {at}, "
        f"{'NULL' if status == 'running' else at})"
    )


def test_a_failed_run_and_drifts_in_review_are_reported(host: Host, connection: Connection) -> None:
    assert only(check_runs, connection).level == "ok"
    add_run(host, "finished", hours=0.1, in_review=3)
    finding = only(check_runs, connection)
    assert (finding.level, finding.detail["in_review"]) == ("warning", 3)
    add_run(host, "failed", hours=0, error="'permission denied'")
    assert "permission denied" in only(check_runs, connection).what


def test_runs_that_did_not_happen_are_an_error(host: Host, connection: Connection) -> None:
    host.execute("UPDATE trueup.installation SET installed_at = now() - interval '9 days'")
    assert {finding.level for finding in found(check_runs, connection)} == {"error"}
    add_run(host, "finished", hours=0.1, kind="'deep'")
    assert {finding.level for finding in found(check_runs, connection)} == {"ok"}


def test_a_stopped_schedule_is_reported(host: Host, connection: Connection) -> None:
    assert only(check_beat, connection).what == "No scheduled run is due yet."
    add_run(host, "finished", hours=5, period="now()")
    assert only(check_beat, connection).level == "error"
    add_run(host, "running", hours=4)  # a manual run in progress: no other run may start
    assert only(check_beat, connection).level == "ok"


def test_balances_that_differ_from_their_log_or_holds_are_reported(host: Host, connection: Connection) -> None:
    user = charge_tokens_of(host)
    host.log(user, 30)
    host.log(host.subscriber(), 5)
    assert [finding.level for finding in found(check_invariants, connection)] == ["ok", "ok", "ok"]
    host.execute("UPDATE trueup.balance SET held = held + 1, consumed = consumed - 1")
    holds, sums, _ = found(check_invariants, connection)
    assert (holds.level, holds.detail) == ("error", {"invariant": "I4", "users": 1, "example": str(user)})
    assert (sums.level, sums.detail) == ("error", {"invariant": "I1", "users": 1, "example": str(user)})
    host.execute("TRUNCATE ai_usage_log")  # marks each balance as stale
    assert found(check_invariants, connection)[1].level == "ok"


def test_a_failure_outside_the_database_is_reported_without_a_traceback() -> None:
    def broken() -> Iterator[Finding]:
        raise OperationalError("SELECT secret", {}, Exception("no route"))

    [finding] = run_check("x", broken)
    assert "no route" in finding.what
    assert "secret" not in finding.what
