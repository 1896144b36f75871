"""A host that changes mapped columns or triggers: the gate closes with an error until trueup is attached again."""

import uuid
from collections.abc import Callable
from contextlib import suppress

import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.billing.view_guard import token_gate
from trueup.database.engine import connect, dispose_engine, get_engine, transaction
from trueup.database.retry import retrying
from trueup.doctor.installation import check_triggers
from trueup.errors import (
    GateClosedError,
    HostChangedError,
    MissingRightError,
    NotInstalledError,
    ServiceUnavailableError,
)
from trueup.gate.holds import Hold
from trueup.host.fields import FullPlanTable, SubscriptionTable, UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.review.decisions import decide_drift
from trueup.settings.settings import get_settings

REPLACED = "ALTER TABLE ai_usage_log RENAME TO old_log; CREATE TABLE ai_usage_log (LIKE old_log INCLUDING ALL)"
PARTITIONED = """
    ALTER TABLE ai_usage_log RENAME TO old_log;
    CREATE TABLE ai_usage_log (LIKE old_log INCLUDING DEFAULTS) PARTITION BY RANGE (created_at);
    CREATE TABLE log_past PARTITION OF ai_usage_log FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
    CREATE TABLE log_now PARTITION OF ai_usage_log FOR VALUES FROM ('2025-01-01') TO (MAXVALUE);
    CREATE INDEX ON ai_usage_log (user_id, created_at);
    INSERT INTO ai_usage_log SELECT * FROM old_log
"""
# Changes that no statement fails on: without the check of the triggers, the gate would use outdated sums.
SILENT = {
    "replaced": (REPLACED, "trueup_deleted is missing, trueup_inserted is missing"),
    "partitioned": (PARTITIONED, "trueup_inserted is missing"),
    "attached as a partition": (
        (
            "ALTER TABLE ai_usage_log RENAME TO old_log; "
            "CREATE TABLE ai_usage_log (LIKE old_log INCLUDING DEFAULTS) PARTITION BY RANGE (created_at); "
            "ALTER TABLE ai_usage_log ATTACH PARTITION old_log FOR VALUES FROM ('2024-01-01') TO (MAXVALUE)"
        ),
        "trueup_inserted is missing",
    ),
    "disabled": ("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_updated", "trigger trueup_updated is disabled"),
    "for replicas": (
        "ALTER TABLE ai_usage_log ENABLE REPLICA TRIGGER trueup_inserted",
        "trueup_inserted is for replicas alone",
    ),
    "dropped": ("DROP TRIGGER trueup_inserted ON ai_usage_log", "trigger trueup_inserted is missing"),
    "off and on again": (
        (
            "ALTER TABLE ai_usage_log DISABLE TRIGGER USER; "
            "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) "
            f"SELECT id, 'chat', 50, '{START}' FROM accounts_user; ALTER TABLE ai_usage_log ENABLE TRIGGER USER"
        ),
        "re-created or disabled for a while",
    ),
    "a column in place of another": (
        (
            "ALTER TABLE ai_usage_log RENAME COLUMN total_tokens TO old_tokens; "
            "ALTER TABLE ai_usage_log ADD COLUMN total_tokens bigint"
        ),
        "or columns were replaced",
    ),
    "subscriptions replaced": (
        (
            "ALTER TABLE billing_subscription RENAME TO old_subs; "
            "CREATE TABLE billing_subscription (LIKE old_subs INCLUDING ALL); "
            "INSERT INTO billing_subscription SELECT * FROM old_subs"
        ),
        "trigger trueup_window_changed is missing",
    ),
}


def renamed(noun: str, column: str, table: str) -> tuple[str, str, HostMapping]:
    """Return a change by the host, the object that is then missing, and the new mapping."""
    kinds = {"usage_log": UsageLogTable, "subscription": SubscriptionTable, "full_plan": FullPlanTable}
    mapping = HostMapping(**{noun: kinds[noun](**{column: "renamed"})})
    return f"ALTER TABLE {table} RENAME COLUMN {column} TO renamed", f"column {table}.{column}", mapping


LOUD = [
    renamed("usage_log", "total_tokens", "ai_usage_log"),
    renamed("subscription", "user_id", "billing_subscription"),
    renamed("full_plan", "tokens_included", "billing_fullplan"),
    (
        "ALTER TABLE billing_subscription RENAME TO subs",
        "table billing_subscription",
        HostMapping(subscription=SubscriptionTable(table="subs")),
    ),
    (
        "ALTER TABLE ai_usage_log RENAME TO log",
        "table ai_usage_log",
        HostMapping(usage_log=UsageLogTable(table="log")),
    ),
]


@pytest.fixture
def user(host: Host, connection: Connection) -> int:
    """Return a user with 100 of 10,000 tokens used, and a balance."""
    user = host.subscriber()
    host.log(user, 100)
    hold_tokens(connection, user, 0, task="warm-up")
    return user


def change_of(host: Host, statements: str) -> None:
    """Run the host's changes, each statement separately."""
    for statement in statements.split(";"):
        host.execute(statement)


def ask(user: int) -> list[Callable[[], object]]:
    """Return the requests to the gate: of a task, of a view, and of a task that needs more tokens."""

    def hold() -> Hold:
        with connect() as own:
            return hold_tokens(own, user)

    def check() -> object:
        with connect() as own:
            return read_account(own, user)

    return [hold, check]


def test_a_session_looks_at_the_hosts_tables_once_a_second(host: Host, connection: Connection, user: int) -> None:
    connection.execute(text("SET trueup.recount_after = '1 hour'"))
    hold_tokens(connection, user, 10)
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    hold_tokens(connection, user, 10)
    read_account(connection, user)
    connection.execute(text("SET trueup.recount_after = ''"))  # the default: one second

    def is_refused() -> bool:
        with suppress(DBAPIError):
            hold_tokens(connection, user, 10)
            return False
        return True

    wait_for(is_refused, "the closed gate")
    for ask_gate in (hold_tokens, read_account):
        with pytest.raises(DBAPIError, match="trueup_inserted is disabled"):
            ask_gate(connection, user)


def test_a_role_that_has_no_setting_of_trueups_passes_the_gate(host: Host, database: str, user: int) -> None:
    name = f"plain_{uuid.uuid4().hex[:8]}"
    host.execute(f"CREATE ROLE {name} LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
    engine = create_engine(make_url(database).set(username=name), poolclass=NullPool)
    with engine.begin() as session:
        assert session.scalar(text("SELECT current_setting('trueup.recount_after', true)")) is None
        assert hold_tokens(session, user, 10).tokens_left == 10
    engine.dispose()
    host.execute(f"DROP ROLE {name}")


def test_a_view_answers_that_it_is_not_ready(host: Host, user: int) -> None:
    gate = token_gate(100, "Test")
    assert gate.refusal(user) is None
    host.execute("DROP TRIGGER trueup_deleted ON ai_usage_log")
    refusal = gate.refusal(user)
    assert refusal is not None
    assert (refusal.status, refusal.body["error_code"]) == (503, "not_ready")


def assert_unavailable(user: int, match: str) -> None:
    for question in ask(user):
        with pytest.raises(HostChangedError, match=match) as caught:
            question()
        assert "Nothing was run, and the gate is closed" in str(caught.value)
        assert "`trueup db attach`" in str(caught.value)


@pytest.mark.parametrize("change", SILENT)
def test_a_change_that_no_statement_fails_on_closes_the_gate_until_the_next_attach(
    host: Host, connection: Connection, user: int, change: str
) -> None:
    statement, wrong = SILENT[change]
    held = hold_tokens(connection, user, 500)
    assert {finding.level for finding in check_triggers(connection, get_settings())} == {"ok"}
    change_of(host, statement)
    host.log(user, 7)
    assert_unavailable(user, wrong)
    assert "error" in {finding.level for finding in check_triggers(connection, get_settings())}
    # Paid usage is still recorded.
    charge_tokens(connection, held, 300)
    attach(HostMapping())
    assert_true(host)
    with connect() as own:
        assert read_account(own, user).consumed == host.used(user)
        hold_tokens(own, user, 0)
    host.log(user, 1)
    assert_true(host)


@pytest.mark.parametrize(("statement", "missing", "mapping"), LOUD, ids=[missing for _, missing, _ in LOUD])
def test_the_error_for_a_renamed_object_names_it_with_the_remedy(
    host: Host, user: int, statement: str, missing: str, mapping: HostMapping
) -> None:
    host.execute(statement)
    # The host's own statements succeed, whatever trueup can count.
    names = mapping.usage_log
    columns = f"user_id, section, {names.total_tokens}, created_at"
    host.execute(
        f"INSERT INTO {names.table} ({columns}) VALUES (:user, 'chat', 5, :at)",
        user=user,
        at=START,
    )
    host.execute(f"UPDATE {names.table} SET {names.total_tokens} = 6 WHERE {names.total_tokens} = 5")
    host.execute(f"DELETE FROM {names.table} WHERE {names.total_tokens} = 100")
    assert_unavailable(user, rf"has no {missing} any more")
    attach(mapping)
    assert_true(host, mapping)
    with connect() as own:
        assert read_account(own, user).consumed == 6
        hold_tokens(own, user, 9_994)


def test_the_error_for_a_changed_column_type_says_so(host: Host, user: int) -> None:
    host.execute("ALTER TABLE ai_usage_log ALTER user_id DROP NOT NULL, DROP CONSTRAINT ai_usage_log_user_id_fkey")
    host.execute("ALTER TABLE ai_usage_log ALTER user_id TYPE uuid USING NULL")
    host.execute("UPDATE trueup.balance SET log_epoch = -1")
    with pytest.raises(HostChangedError), connect() as own:
        hold_tokens(own, user)


RETYPED = {
    "tokens": "ALTER total_tokens DROP DEFAULT, ALTER total_tokens TYPE text",
    "flag": "ALTER success DROP DEFAULT, ALTER success TYPE text",
    "time": "ALTER created_at DROP DEFAULT, ALTER created_at TYPE text",
    "user": "DROP CONSTRAINT ai_usage_log_user_id_fkey, ALTER user_id TYPE text",
}


@pytest.mark.parametrize("change", RETYPED)
def test_a_host_can_write_after_it_changed_the_type_of_a_column(host: Host, user: int, change: str) -> None:
    host.execute(f"ALTER TABLE ai_usage_log {RETYPED[change]}")
    values = f"'{user}', 'chat', '5', 'true', '{START}'"
    host.execute(f"INSERT INTO ai_usage_log (user_id, section, total_tokens, success, created_at) VALUES ({values})")
    host.execute("UPDATE ai_usage_log SET total_tokens = '6'")
    host.execute("DELETE FROM ai_usage_log")
    with pytest.raises(HostChangedError), connect() as own:
        hold_tokens(own, user, 0)


def test_a_host_can_write_if_the_mapping_uses_a_function_that_was_dropped(host: Host, user: int) -> None:
    host.execute("CREATE FUNCTION counts(boolean) RETURNS boolean IMMUTABLE LEAKPROOF LANGUAGE sql AS 'SELECT $1'")
    mapping = HostMapping.model_validate({"usage_log": {"counts": {"expression": "public.counts({row}.success)"}}})
    attach(mapping)
    with connect() as own:
        hold_tokens(own, user, 0)
    host.execute("ALTER FUNCTION counts(boolean) RENAME TO was")
    host.log(user, 7)
    with pytest.raises(NotInstalledError, match="counts"), connect() as own:
        hold_tokens(own, user, 0)
    host.execute("ALTER FUNCTION was(boolean) RENAME TO counts")
    with connect() as own:
        hold_tokens(own, user, 0)
    assert host.value("SELECT consumed FROM trueup.balance") == 107


def test_renaming_an_enum_label_that_the_mapping_names_closes_the_gate(host: Host) -> None:
    user = host.subscriber()
    host.execute(
        "CREATE TYPE state AS ENUM ('on', 'off'); ALTER TABLE billing_subscription ADD state state DEFAULT 'on'"
    )
    given = {"subscription": {"is_active": {"expression": "{row}.state = 'on'"}}}
    attach(HostMapping.model_validate(given))
    with connect() as own:
        hold_tokens(own, user, 0)
    host.execute("ALTER TYPE state RENAME VALUE 'on' TO 'active'")
    dispose_engine()  # a session with a cached plan would still use the label's number
    with pytest.raises(HostChangedError, match="invalid input value for enum"), connect() as own:
        hold_tokens(own, user, 0)


def test_no_decision_corrects_a_counter_with_outdated_sums(host: Host, user: int) -> None:
    host.plan(500)
    host.execute("UPDATE billing_subscription SET tokens_remaining = 10400")  # as after buying a pack
    reconcile(get_engine(), HostMapping())
    drift = host.value("SELECT id FROM trueup.drift WHERE action = 'review'")
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    host.log(user, 400)
    with pytest.raises(HostChangedError, match="trueup_inserted is disabled"), connect() as own:
        decide_drift(own, drift, "accept", by="ann", note="looked at it")
    assert host.counter(user) == 10_400


def test_a_quick_pass_corrects_no_counter_with_outdated_sums(host: Host, user: int) -> None:
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    host.log(user, 400)
    counter = host.counter(user)
    with pytest.raises(HostChangedError, match="trueup_inserted is disabled"):
        reconcile(get_engine(), HostMapping())
    assert host.counter(user) == counter
    reconcile(get_engine(), HostMapping(), kind="deep")
    assert host.value("SELECT consumed FROM trueup.balance") == 500


def test_an_extension_of_a_hold_is_refused_by_a_closed_gate_too(host: Host, connection: Connection, user: int) -> None:
    hold_tokens(connection, user, 500, task="long")
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    statement = text("SELECT * FROM trueup.extend_hold(:user, 'long', 1, 'Test', 100, 'enforce', NULL)")
    with pytest.raises(HostChangedError), connect() as own:
        own.execute(statement, {"user": user})
    assert host.value("SELECT held FROM trueup.balance") == 500


def test_a_repeated_setup_rebuilds_the_balances_as_an_attach_does(host: Host, user: int) -> None:
    change_of(host, SILENT["off and on again"][0])
    assert_unavailable(user, "disabled for a while")
    with host.engine.begin() as setting_up:
        install(setting_up, HostMapping(), with_host_tables=False)
    with connect() as own:
        hold_tokens(own, user, 0)
    assert host.value("SELECT consumed FROM trueup.balance") == host.used(user) == 150


def test_unrelated_changes_of_the_host_do_not_close_the_gate(host: Host, connection: Connection, user: int) -> None:
    host.execute(
        "ALTER TABLE ai_usage_log ADD COLUMN note text, ADD CONSTRAINT positive CHECK (total_tokens >= 0); "
        "CREATE INDEX ON ai_usage_log (section); "
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
        "CREATE TRIGGER other AFTER INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION nothing(); "
        "ALTER TABLE ai_usage_log DISABLE TRIGGER other; ALTER TABLE ai_usage_log CLUSTER ON ai_usage_log_pkey"
    )
    host.execute("CLUSTER ai_usage_log")
    host.execute("VACUUM FULL pg_trigger")
    host.log(user, 20)
    assert hold_tokens(connection, user, 9_880).tokens_left == 9_880


def test_a_new_mapping_in_the_settings_closes_the_gate_until_the_next_attach(
    host: Host, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has renamed a column, the workers have the new mapping, and `db attach` has not run yet."""
    host.execute("ALTER TABLE billing_subscription RENAME COLUMN tokens_remaining TO renamed")
    monkeypatch.setenv("TRUEUP_HOST__SUBSCRIPTION__TOKENS_REMAINING", "renamed")
    get_settings.cache_clear()
    with pytest.raises(GateClosedError, match="another mapping than that of the settings"), connect() as own:
        hold_tokens(own, user)
    attach(get_settings().host)
    with connect() as own:
        hold_tokens(own, user, 9_900)


def test_a_running_attach_closes_the_gate_temporarily(host: Host, user: int) -> None:
    host.execute("UPDATE trueup.installation SET mapping_fingerprint = 'attaching'")
    host.execute("DROP FUNCTION trueup.require_counted()")
    with pytest.raises(GateClosedError, match="is running, or was interrupted"), connect() as own:
        hold_tokens(own, user)


def test_the_error_for_a_revoked_right_names_the_right_and_the_command(host: Host, user: int) -> None:
    def hold_without_rights() -> None:
        with transaction() as own:
            own.execute(text("SET LOCAL ROLE pg_read_all_stats"))
            hold_tokens(own, user)

    with pytest.raises(MissingRightError, match=r"permission denied.*trueup db grants"):
        hold_without_rights()


def test_a_call_is_retried_if_its_function_was_replaced_during_the_call(host: Host) -> None:
    calls = []

    def call(own: Connection) -> str:
        calls.append(own)
        if len(calls) == 1:
            message = "cache lookup failed for function 4711"
            own.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION '{message}' USING ERRCODE = 'XX000'; END $$")
        return "called"

    assert retrying(call) == "called"


def test_a_connection_with_an_outdated_prepared_statement_is_not_used_again(host: Host) -> None:
    host.execute("CREATE FUNCTION public.answer() RETURNS TABLE (a int) LANGUAGE sql AS 'SELECT 1'")
    select = text("SELECT * FROM public.answer()")
    with connect() as own:
        for _ in range(10):
            own.execute(select)
    host.execute(
        "DROP FUNCTION public.answer(); "
        "CREATE FUNCTION public.answer() RETURNS TABLE (a text) LANGUAGE sql AS 'SELECT ''2'''"
    )
    with pytest.raises(ServiceUnavailableError, match="cached plan must not change"), connect() as own:
        own.execute(select)
    assert retrying(lambda own: own.execute(select).scalar_one()) == "2"
