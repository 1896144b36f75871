"""What a provider was paid for counts, whatever the host refuses to write."""

from datetime import timedelta

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true
from tests.support.host import NOW, START, Host
from tests.support.sessions import run_at_once
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import connect, get_engine
from trueup.errors import TokensDenied, UnknownUserError
from trueup.gate.holds import close_hold
from trueup.gate.owed_charges import list_owed_charges, settle_owed_charges
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reconcile.audit import find_anomalies, find_balance_mismatches
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings
from trueup.tasks import upkeep
from trueup.usage.log import track_ai_usage
from trueup.worker.config import beat_schedule

# What the host does, and how it undoes it.
REFUSALS = {
    "a check": (
        """
        ALTER TABLE ai_usage_log ADD CONSTRAINT small CHECK (total_tokens < 100) NOT VALID
        """,
        "ALTER TABLE ai_usage_log DROP CONSTRAINT small",
    ),
    "a trigger": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM current_setting(''app.user''); RETURN NEW; END';
        CREATE TRIGGER refuse BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON ai_usage_log",
    ),
    "a trigger at the commit": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RAISE ''not now''; END';
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON ai_usage_log DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON ai_usage_log",
    ),
    "a trigger that drops the row": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RETURN NULL; END';
        CREATE TRIGGER refuse BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON ai_usage_log",
    ),
    "a trigger that takes too long": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_sleep(3600); END';
        CREATE TRIGGER refuse BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON ai_usage_log",
    ),
    "a new column that must be given": (
        """
        ALTER TABLE ai_usage_log ADD tenant integer NOT NULL
        """,
        "ALTER TABLE ai_usage_log DROP tenant",
    ),
    "a key to another table": (
        """
        CREATE TABLE sections (name varchar(50) PRIMARY KEY);
        ALTER TABLE ai_usage_log ADD CONSTRAINT section FOREIGN KEY (section) REFERENCES sections
        """,
        "ALTER TABLE ai_usage_log DROP CONSTRAINT section",
    ),
    "a renamed column": (
        """
        ALTER TABLE ai_usage_log RENAME model_name TO model
        """,
        "ALTER TABLE ai_usage_log RENAME model TO model_name",
    ),
    "a renamed table": (
        """
        ALTER TABLE ai_usage_log RENAME TO old_log
        """,
        "ALTER TABLE old_log RENAME TO ai_usage_log",
    ),
}


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(2_000)


def statements(host: Host, script: str) -> None:
    with host.engine.begin() as connection:
        connection.exec_driver_sql(script)


@pytest.mark.parametrize("what", REFUSALS)
def test_a_charge_whose_row_the_host_refuses_counts_and_is_written_later(
    host: Host, connection: Connection, user: int, what: str
) -> None:
    refuse, allow = REFUSALS[what]
    hold = hold_tokens(connection, user, 1_500, task="task")
    statements(host, refuse)
    connection.execute(text("SET statement_timeout = '2s'"))
    charge = charge_tokens(connection, hold, 1_400)
    assert (charge.recorded, charge.owed, charge.tokens_left) == (True, True, 100)
    assert not charge_tokens(connection, hold, 1_400).recorded
    assert settle_owed_charges(connection) == (0, 1)
    connection.execute(text("SET statement_timeout = '30s'"))
    assert balance(host, user) == (1_400, 100)
    close_hold(connection, hold)
    if not what.startswith("a renamed"):  # then the gate is closed for everybody
        with pytest.raises(TokensDenied, match="700 needed, 600 available"):
            hold_tokens(connection, user, 700)
        assert_true(host)
    (owed,) = list_owed_charges(connection)
    assert (owed.user_id, owed.task_id, owed.call_key, owed.tokens, owed.tries) == (user, "task", "1", 1_400, 2)
    statements(host, allow)
    assert settle_owed_charges(connection) == (1, 0)
    assert settle_owed_charges(connection) == (0, 0)
    assert (host.used(user), balance(host, user)) == (1_400, (1_400, 0))
    assert host.value("SELECT count(*) FROM ai_usage_log l JOIN trueup.charge c ON c.log_id = l.id::text") == 1
    assert_true(host)


def test_a_counter_that_the_host_refuses_to_lower_is_lowered_by_the_next_reconcile(
    host: Host, connection: Connection, user: int
) -> None:
    statements(
        host,
        "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM current_setting(''app.user''); RETURN NEW; END'; "
        "CREATE CONSTRAINT TRIGGER audit AFTER UPDATE ON billing_subscription DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION audit()",
    )
    charge = charge_tokens(connection, hold_tokens(connection, user, 1_500), 1_400)
    assert not charge.owed
    assert (host.used(user), host.counter(user), balance(host, user)) == (1_400, 2_000, (1_400, 100))
    assert host.value("SELECT counter_lowered FROM trueup.charge") is False
    statements(host, "DROP TRIGGER audit ON billing_subscription")
    reconcile(get_engine(), HostMapping())
    assert host.counter(user) == 600
    assert_true(host)


@pytest.fixture
def refused(host: Host) -> None:
    statements(host, REFUSALS["a check"][0])


@pytest.mark.usefixtures("refused")
def test_no_more_is_bought_than_the_budget_while_every_row_is_refused(
    host: Host, connection: Connection, user: int
) -> None:
    bought = 0
    for _ in range(12):
        try:
            hold = hold_tokens(connection, user, 500)
        except TokensDenied:
            continue
        bought += charge_tokens(connection, hold, 500).recorded
        close_hold(connection, hold)
    assert bought == 4
    assert read_account(connection, user).consumed == 2_000
    assert host.value("SELECT count(*) FROM trueup.owed_charge") == 4


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    "rebuild",
    [
        "INSERT INTO trueup.log_truncation DEFAULT VALUES",
        "UPDATE trueup.balance SET log_epoch = -1",
        "DELETE FROM trueup.hold; DELETE FROM trueup.balance",
        "DELETE FROM trueup.balance; SELECT trueup.fill_balances(NULL, 10)",
    ],
)
def test_a_balance_built_anew_has_the_owed_charges(host: Host, connection: Connection, user: int, rebuild: str) -> None:
    host.log(user, 50)
    hold = hold_tokens(connection, user, 500)
    charge_tokens(connection, hold, 400)
    close_hold(connection, hold)
    statements(host, rebuild)
    assert read_account(connection, user).consumed == 450
    connection.execute(text("SELECT trueup.refresh_balances(ARRAY[:user]::bigint[], NULL)"), {"user": user})
    assert balance(host, user) == (450, 0)
    assert find_balance_mismatches(connection, HostMapping(), None, None) == []
    assert_true(host)


@pytest.mark.usefixtures("refused")
def test_an_owed_charge_of_a_window_that_has_ended_counts_no_more(
    host: Host, connection: Connection, user: int
) -> None:
    charge_tokens(connection, hold_tokens(connection, user, 500, now=NOW), 400, now=NOW)
    host.execute("UPDATE billing_subscription SET start_date = :at", at=NOW + timedelta(days=1))
    assert read_account(connection, user).consumed == 0
    statements(host, REFUSALS["a check"][1])
    assert settle_owed_charges(connection) == (1, 0)
    assert (host.used(user), read_account(connection, user).consumed) == (400, 0)
    assert_true(host)


@pytest.mark.usefixtures("refused")
def test_a_deep_pass_finds_nothing_wrong_with_an_owed_charge_and_writes_its_row_when_it_can(
    host: Host, connection: Connection, user: int
) -> None:
    charge_tokens(connection, hold_tokens(connection, user, 500), 400)
    assert find_anomalies(connection, "bigint", None, None) == []
    summary = reconcile(get_engine(), HostMapping(), kind="deep")
    assert (summary.defects, summary.drifted, host.counter(user)) == (0, 0, 1_600)
    statements(host, REFUSALS["a check"][1])
    reconcile(get_engine(), HostMapping())
    assert (host.used(user), list_owed_charges(connection)) == (400, [])


@pytest.mark.usefixtures("refused")
def test_a_row_that_the_host_brings_itself_is_not_written_again(host: Host, connection: Connection, user: int) -> None:
    charge_tokens(connection, hold_tokens(connection, user, 500), 400)
    statements(host, REFUSALS["a check"][1])
    statements(
        host,
        "INSERT INTO ai_usage_log (id, user_id, section, total_tokens, success, created_at) "
        "SELECT log_id::uuid, user_id, section, total_tokens, success, used_at FROM trueup.owed_charge",
    )
    assert settle_owed_charges(connection) == (1, 0)
    assert (host.used(user), read_account(connection, user).consumed) == (400, 400)
    assert_true(host)


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("subscribed", [True, False])
def test_reported_usage_whose_row_the_host_refuses_counts_and_is_written_later(
    host: Host, connection: Connection, subscribed: bool
) -> None:
    user = host.subscriber(2_000) if subscribed else host.user()

    def report() -> tuple[bool, bool]:
        found = track_ai_usage(user, section="chat", prompt_tokens=300, completion_tokens=0, model_name="m", key="k")
        return found.recorded, found.owed

    assert (report(), report()) == ((True, True), (False, False))
    assert read_account(connection, user).consumed == (300 if subscribed else 0)
    statements(host, REFUSALS["a check"][1])
    assert settle_owed_charges(connection) == (1, 0)
    assert report() == (False, False)
    if not subscribed:
        host.execute(
            "INSERT INTO billing_subscription (id, user_id, start_date, is_active, tokens_remaining) "
            "VALUES (900, :user, :start, true, 0)",
            user=user,
            start=START,
        )
    assert (host.used(user), read_account(connection, user).consumed) == (300, 300)
    connection.execute(text("SELECT trueup.refresh_balances(ARRAY[:user]::bigint[], NULL)"), {"user": user})
    assert balance(host, user) == (300, 0)
    assert_true(host)


@pytest.mark.usefixtures("refused")
def test_an_owed_charge_of_a_user_whom_the_host_deletes_is_given_up(
    host: Host, connection: Connection, user: int
) -> None:
    hold = hold_tokens(connection, user, 1_500)
    charge_tokens(connection, hold, 400)
    statements(host, f"DELETE FROM billing_subscription; DELETE FROM accounts_user WHERE id = {user}")
    with pytest.raises(UnknownUserError):
        charge_tokens(connection, hold, 50, key="2")
    assert settle_owed_charges(connection) == (0, 1)
    statements(host, REFUSALS["a check"][1])
    assert settle_owed_charges(connection) == (1, 0)
    assert list_owed_charges(connection) == []


@pytest.mark.usefixtures("refused")
def test_two_processes_write_the_row_of_an_owed_charge_once(host: Host, connection: Connection, user: int) -> None:
    charge_tokens(connection, hold_tokens(connection, user, 500), 400)
    statements(host, REFUSALS["a check"][1])
    engine = create_engine(host.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def settle() -> int:
        with engine.connect() as own:
            return sum(settle_owed_charges(own))

    run_at_once([settle] * 4)
    assert (host.used(user), balance(host, user)[0]) == (400, 400)
    assert_true(host)


def test_a_dropped_sequence_leaves_charges_owed(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = HostMapping(usage_log_id_type="bigint")
    monkeypatch.setenv("TRUEUP_HOST", mapping.model_dump_json())
    get_settings.cache_clear()
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as setup:
        install(setup, mapping, with_host_tables=True)
    with Host(engine) as host, connect() as connection:
        user = host.subscriber(2_000)
        hold = hold_tokens(connection, user, 1_500)
        host.execute("ALTER TABLE ai_usage_log ALTER id DROP IDENTITY")
        assert charge_tokens(connection, hold, 400).owed
        assert read_account(connection, user).consumed == 400
        host.execute("ALTER TABLE ai_usage_log ALTER id ADD GENERATED BY DEFAULT AS IDENTITY")
        assert settle_owed_charges(connection) == (1, 0)
        assert host.value("SELECT c.log_id = l.id::text FROM trueup.charge c, ai_usage_log l") is True
        assert_true(host, mapping)


def test_beat_sends_a_task_that_settles_owed_charges(host: Host, connection: Connection, user: int) -> None:
    statements(host, REFUSALS["a check"][0])
    charge_tokens(connection, hold_tokens(connection, user, 500), 400)
    settings = get_settings()
    entry = beat_schedule(settings)["settle-owed-charges"]
    assert entry["task"] == upkeep.settle_owed_charges.name
    assert entry["schedule"].total_seconds() == settings.expire_interval_seconds
    assert upkeep.settle_owed_charges() == {"settled": 0, "refused": 1}
    statements(host, REFUSALS["a check"][1])
    assert upkeep.settle_owed_charges() == {"settled": 1, "refused": 0}
    assert host.used(user) == 400


@pytest.mark.parametrize("does", ["RAISE ''append only''", "PERFORM pg_sleep(3600)"], ids=["refuses", "takes-too-long"])
def test_an_append_only_log_takes_the_row_of_a_call_with_an_error(
    host: Host, user: int, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_STATEMENT_TIMEOUT_SECONDS", "2")
    get_settings.cache_clear()
    statements(
        host,
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {does}; RETURN NEW; END';
        CREATE TRIGGER refuse BEFORE UPDATE ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
    )
    given = {"section": "chat", "prompt_tokens": 300, "completion_tokens": 0, "model_name": "m", "key": "k"}
    tracked = track_ai_usage(user, error_message="it broke off", **given)
    assert (tracked.recorded, tracked.owed, host.used(user)) == (True, False, 300)
