import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from tests.install.test_detach import writing
from tests.support.books import assert_true
from tests.support.dumps import pg_dump
from tests.support.host import Host
from tests.support.sessions import (
    backend_pid,
    impatient,
    in_background,
    locked,
    locked_balance,
    run_at_once,
)
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect, dispose_engine, transaction
from trueup.database.locks import HostBusyError, take_step
from trueup.database.retry import retrying
from trueup.errors import HostChangedError, MissingRightError, NotInstalledError
from trueup.gate.holds import close_hold
from trueup.host.fields import UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.install.attach import (
    LOG_STEP,
    SUBSCRIPTION_STEP,
    AttachError,
    attach,
    fill,
    is_ready,
    open_gate,
    opening_scripts,
    prepare,
    prepare_scripts,
)
from trueup.install.install import check_installed, install, run_scripts
from trueup.install.plan import OtherInstallationError, plan_attach, refuse_other_installation
from trueup.settings.settings import get_settings

MAPPING = HostMapping()
TRUEUP = Path(sys.executable).with_name("trueup")


@pytest.fixture
def host(bare_host: Host) -> Host:
    return bare_host


def balances(host: Host) -> dict[int, int]:
    """Return the consumed tokens of each balance that is up to date, by user."""
    rows = host.execute("SELECT user_id, consumed FROM trueup.balance WHERE log_epoch = trueup.log_epoch()")
    return {row.user_id: row.consumed for row in rows}


def test_balances_are_right_while_the_host_writes_all_the_time(host: Host, connection: Connection) -> None:
    users = [host.subscriber() for _ in range(5)]
    for user in users:
        host.log(user, 100)
        host.log(user, 50, success=False)
    with writing(host.engine, users[0]) as written:
        attach(MAPPING)
        since = len(written)
        wait_for(lambda: len(written) > since + 10, "the host to go on")
        assert_true(host)
    assert_true(host)
    assert host.used(users[0]) == 100 + sum(written)
    assert balances(host).keys() == set(users)
    assert all(balances(host)[user] == 100 for user in users[1:])
    check_installed(connection)
    hold_tokens(connection, users[1], 9_900)


def test_attach_creates_the_same_objects_as_install(host: Host, empty_database: str) -> None:
    attach(MAPPING)
    attached = pg_dump(empty_database, "--schema-only")
    host.execute("DROP SCHEMA trueup CASCADE")
    with host.engine.begin() as connection:
        install(connection, MAPPING, with_host_tables=False)
    installed = pg_dump(empty_database, "--schema-only")
    assert any("trueup_window_changed" in line for line in attached)
    assert attached == installed


def test_a_second_attach_takes_no_lock_and_the_gate_stays_open(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    attach(MAPPING)
    charge_tokens(connection, hold_tokens(connection, user), 300)
    host.log(user, 20)
    epoch = host.value("SELECT trueup.log_epoch()")
    with locked(host, "LOCK TABLE ai_usage_log, billing_subscription IN ROW EXCLUSIVE MODE"):
        take_step(lambda again: prepare(again, MAPPING), patience_seconds=0)
        hold_tokens(connection, user, 0)
        assert attach(MAPPING, patience_seconds=0) == {"balances": 0}
    assert host.value("SELECT trueup.log_epoch()") == epoch
    assert_true(host)


def test_running_gates_are_not_disturbed_while_functions_are_replaced(host: Host) -> None:
    user, over, held = host.subscriber(), threading.Event(), [0, 0]
    attach(MAPPING)

    def hold_and_release() -> None:
        hold = retrying(lambda connection: hold_tokens(connection, user, 1))
        retrying(lambda connection: close_hold(connection, hold))

    def work(place: int) -> None:
        while not over.is_set():
            hold_and_release()
            held[place] += 1

    with in_background() as submit:
        working = [submit(work, place) for place in range(len(held))]
        try:
            for _ in range(3):
                before = list(held)
                attach(MAPPING)
                wait_for(lambda before=before: all(now > then for now, then in zip(held, before, strict=True)))
        finally:
            over.set()
        for future in working:
            future.result()


STEPS: tuple[Callable[[Connection], None], ...] = (
    lambda connection: prepare(connection, MAPPING),
    lambda connection: LOG_STEP.take(connection, MAPPING),
    lambda connection: SUBSCRIPTION_STEP.take(connection, MAPPING),
    lambda connection: connection.execute(text("SELECT trueup.fill_balances(NULL, 1)")).close(),
)


@pytest.mark.parametrize("taken", range(1, len(STEPS) + 1))
def test_interrupted_after_any_step_the_gate_is_closed_and_the_next_run_continues(
    host: Host, connection: Connection, taken: int
) -> None:
    users = [host.subscriber(), host.subscriber()]
    host.log(users[0], 100)
    for step in STEPS[:taken]:
        take_step(step)
    host.log(users[0], 20)
    with pytest.raises(NotInstalledError, match="is not ready for trueup"), connect() as worker:
        hold_tokens(worker, users[0])
    with pytest.raises(NotInstalledError, match=r"interrupted\. Run `trueup db attach`"):
        check_installed(connection)
    # Balances that were built are not built again.
    assert attach(MAPPING)["balances"] == (1 if taken == len(STEPS) else 2)
    assert balances(host).keys() == set(users)
    assert_true(host)
    hold_tokens(connection, users[0], 0)
    assert host.value("SELECT consumed FROM trueup.balance WHERE user_id = :user", user=users[0]) == 120


def test_concurrent_attaches_are_serialized(host: Host) -> None:
    user = host.subscriber()
    host.log(user, 100)
    run_at_once([lambda: attach(MAPPING)] * 3)
    assert balances(host) == {user: 100}
    assert_true(host)


@pytest.mark.parametrize("table", ["ai_usage_log", "billing_subscription"])
def test_a_table_that_stays_locked_ends_the_command_with_an_error(host: Host, table: str) -> None:
    user = host.subscriber()
    with locked(host, f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE") as busy:
        with pytest.raises(HostBusyError, match=f'locked "{table}" .*process {backend_pid(busy)} '):
            attach(MAPPING, patience_seconds=0)
        with impatient(host) as other:
            other.execute(text("DELETE FROM ai_usage_log"))
            other.execute(text("UPDATE billing_subscription SET tokens_remaining = 5"))
    attach(MAPPING)
    host.log(user, 20)
    assert_true(host)


@pytest.mark.parametrize(
    "loss",
    [
        "ALTER TABLE ai_usage_log DISABLE TRIGGER USER",
        "DROP TRIGGER trueup_inserted ON ai_usage_log",
        "ALTER TABLE ai_usage_log RENAME TO old_log; CREATE TABLE ai_usage_log (LIKE old_log INCLUDING ALL)",
    ],
)
def test_lost_triggers_are_created_again_and_rows_that_they_missed_count(
    host: Host, connection: Connection, loss: str
) -> None:
    user = host.subscriber()
    host.log(user, 100)
    attach(MAPPING)
    host.execute(loss)
    host.log(user, 20)
    assert not plan_attach(connection, MAPPING).log_watched
    take_step(lambda again: prepare(again, MAPPING))
    with pytest.raises(NotInstalledError, match="interrupted"):
        check_installed(connection)
    assert attach(MAPPING)["balances"] == 1
    host.log(user, 3)
    assert_true(host)
    hold_tokens(connection, user, 0)
    assert host.value("SELECT consumed FROM trueup.balance") == host.used(user)


def test_another_mapping_rebuilds_every_balance_even_after_an_interruption(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    host.log(user, 100)
    attach(MAPPING)
    host.execute("ALTER TABLE ai_usage_log ADD COLUMN billed integer; UPDATE ai_usage_log SET billed = 7")
    other = HostMapping(usage_log=UsageLogTable(total_tokens="billed"))
    take_step(lambda again: prepare(again, other))
    assert attach(other)["balances"] == 1
    assert balances(host) == {user: 7}
    take_step(lambda again: prepare(again, MAPPING))
    take_step(lambda again: prepare(again, other))
    assert attach(MAPPING)["balances"] == 1
    assert balances(host) == {user: 100}


def test_a_balance_that_does_not_agree_with_the_log_keeps_the_gate_closed(host: Host) -> None:
    user = host.subscriber()
    for step in STEPS[:3]:
        take_step(step)
    fill()
    host.execute("UPDATE trueup.balance SET consumed = 1")
    with pytest.raises(AttachError, match=rf"those of {user}\. The gate stays closed"):
        take_step(lambda connection: open_gate(connection, MAPPING))
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_updated")
    with pytest.raises(AttachError, match="missing or disabled"):
        take_step(lambda connection: open_gate(connection, MAPPING))
    with pytest.raises(NotInstalledError), connect() as worker:
        hold_tokens(worker, user)


def test_balances_are_built_in_batches_and_locked_ones_are_skipped(host: Host, connection: Connection) -> None:
    users = [host.subscriber() for _ in range(7)]
    attach(MAPPING)
    for user in users:
        host.log(user, user)
    hold_tokens(connection, users[0], 200)
    host.execute("TRUNCATE ai_usage_log")
    for user in users:
        host.log(user, 2 * user)
    with locked_balance(host, users[3]):
        assert fill(batch_users=2) == 6
    assert balances(host) == {user: 2 * user for user in users if user != users[3]}
    assert host.value("SELECT held FROM trueup.balance WHERE user_id = :user", user=users[0]) == 200
    assert set(host.execute("SELECT user_id FROM trueup.usage_delta").scalars()) == {users[3]}
    assert_true(host)


def test_killed_after_any_step_the_next_attach_continues_while_the_host_writes(
    host: Host, connection: Connection
) -> None:
    """The real program is killed as soon as it has printed a step."""
    users = [host.subscriber() for _ in range(3)]
    host.log(users[1], 100)
    steps = ("Tables are", "The trigger", "Balances are")
    with writing(host.engine, users[0]):
        for step in steps:
            assert any(line.startswith(step) for line in told_until(step))
        attach(MAPPING)
        assert_true(host)
    assert balances(host).keys() == set(users)
    hold_tokens(connection, users[1], 9_900)


def told_until(step: str) -> list[str]:
    """Run the real program and kill it once it prints that step. Returns its output."""
    told = []
    command = [TRUEUP, "db", "attach", "--yes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            if line.startswith(step):
                process.kill()
    return told


def test_a_trigger_changed_by_another_session_makes_attach_start_again(host: Host) -> None:
    user = host.subscriber()
    host.log(user, 100)
    for step in STEPS[:2]:
        take_step(step)
    fill()
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER USER")
    host.log(user, 20)
    host.execute("ALTER TABLE ai_usage_log ENABLE TRIGGER USER")
    with pytest.raises(AttachError, match="Another session disabled or re-created"):
        take_step(STEPS[2])
    attach(MAPPING)
    assert balances(host) == {user: 120}
    assert_true(host)


def test_the_rights_in_the_error_are_the_rights_that_attach_needs(
    host: Host, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, role = host.subscriber(), f"setup_{uuid.uuid4().hex[:8]}"
    host.log(user, 100)
    host.execute(f"CREATE ROLE {role} LOGIN")
    monkeypatch.setenv("TRUEUP_DATABASE_URL", str(make_url(empty_database).set(username=role)))
    get_settings.cache_clear()
    dispose_engine()
    try:
        with pytest.raises(MissingRightError, match=r"CREATE ON DATABASE .*SELECT .*TRIGGER|TRIGGER") as refused:
            attach(MAPPING)
        assert host.value("SELECT to_regnamespace('trueup') IS NULL")
        host.execute(str(refused.value).partition("tables run: ")[2])
        attach(MAPPING)
        assert balances(host) == {user: 100}
        host.execute(
            f"REVOKE SELECT ON ai_usage_log FROM {role}; REVOKE SELECT (total_tokens) ON ai_usage_log FROM {role}"
        )
        with pytest.raises(MissingRightError, match=r'SELECT \("total_tokens"\) ON TABLE public.ai_usage_log'):
            attach(MAPPING)
    finally:
        dispose_engine()
        host.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_second_application_in_the_database_is_refused(host: Host, connection: Connection) -> None:
    attach(MAPPING)
    refuse_other_installation(connection, MAPPING)
    host.execute("CREATE TABLE other_log (LIKE ai_usage_log INCLUDING ALL)")
    other = HostMapping(usage_log=UsageLogTable(table="other_log"))
    with pytest.raises(
        OtherInstallationError, match=r"attached to ai_usage_log .*the settings say other_log.*--replace"
    ):
        refuse_other_installation(connection, other)
    # A renamed table is the same table.
    host.execute("DROP TABLE other_log; ALTER TABLE ai_usage_log RENAME TO other_log")
    refuse_other_installation(connection, other)


def test_the_plan_lists_the_steps_and_the_missing_rights(host: Host, connection: Connection) -> None:
    host.subscriber()
    host.execute("ANALYZE")
    plan = plan_attach(connection, MAPPING)
    assert (plan.tables_there, plan.log_watched, plan.subscriptions_watched) == (False, False, False)
    assert (plan.subscription_rows, plan.lacking) == (1, ())
    attach(MAPPING)
    plan = plan_attach(connection, MAPPING)
    assert (plan.tables_there, plan.log_watched, plan.subscriptions_watched) == (True, True, True)
    connection.execute(text("SET ROLE pg_read_all_data"))
    lacking = dict(plan_attach(connection, MAPPING).lacking)
    connection.execute(text("RESET ROLE"))
    assert lacking["TRIGGER ON TABLE public.ai_usage_log"].endswith('public.ai_usage_log TO "pg_read_all_data"')
    assert "to own SCHEMA trueup" in lacking
    with pytest.raises(NotInstalledError, match='no table "gone"'):
        plan_attach(connection, HostMapping(usage_log=UsageLogTable(table="gone")))


@pytest.mark.parametrize(
    "scripts",
    [prepare_scripts(MAPPING, ready=True), opening_scripts(MAPPING)],
    ids=["first", "last"],
)
def test_triggers_disabled_during_another_attach_are_noticed(
    host: Host, connection: Connection, scripts: list[str]
) -> None:
    user = host.subscriber()
    attach(MAPPING)
    hold_tokens(connection, user, 0)
    with transaction() as again:
        assert is_ready(again, MAPPING)
        host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER USER")
        host.log(user, 20)
        host.execute("ALTER TABLE ai_usage_log ENABLE TRIGGER USER")
        run_scripts(again, scripts)
    with pytest.raises(HostChangedError, match="disabled for a while"), connect() as worker:
        hold_tokens(worker, user, 0)


@pytest.mark.parametrize("again", [False, True])
def test_wrong_balances_behind_an_open_gate_are_rebuilt_or_the_gate_is_closed(host: Host, again: bool) -> None:
    user = host.subscriber()
    host.log(user, 100)
    attach(MAPPING)
    # Once, as after rows dropped with a partition; or each time the balances are built.
    host.execute("UPDATE trueup.balance SET consumed = 90")
    if not again:
        assert attach(MAPPING) == {"balances": 1}
        assert_true(host)
        with connect() as worker:
            hold_tokens(worker, user, 9_900)
        return
    host.execute(
        "CREATE FUNCTION public.wrong() RETURNS trigger LANGUAGE plpgsql "
        "AS 'BEGIN NEW.consumed := NEW.consumed - 10; RETURN NEW; END'"
    )
    host.execute("CREATE TRIGGER wrong BEFORE UPDATE ON trueup.balance FOR EACH ROW EXECUTE FUNCTION public.wrong()")
    with pytest.raises(AttachError, match=r"do not agree with the log.*The gate stays closed"):
        attach(MAPPING)
    with pytest.raises(NotInstalledError, match="is not ready for trueup"), connect() as worker:
        hold_tokens(worker, user, 0)
