"""No code of another role runs in trueup's sessions or functions; triggers of the host still find their tables."""

import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tests.cli.conftest import settings, trueup, trueup_json
from tests.support import hostile, model_tasks
from tests.support.host import Host
from tests.support.work import OWNER, charge_tokens, hold_tokens
from tests.support.worker import own_application
from trueup.database.engine import connect, dispose_engine, get_engine
from trueup.drift.journal import prune_journal
from trueup.errors import HoldBusyError, TokensDenied
from trueup.gate.holds import abandon_calls, expire_holds, keep_holds
from trueup.gate.provider_calls import begin_call, end_call, extend_hold
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.shards import shard_ends
from trueup.usage.charges import prune_answers
from trueup.usage.log import track_ai_usage

__all__ = ["settings"]

# Attaching makes fill_balances anew after it was called. The others need a run that lasts for a heartbeat, a broken
# balance, a refused log row, a partition, a drift with several components, or two gates at once. They too have a fixed
# search path, as the first test sees.
NOT_CALLED = {
    "delete_lost_deltas",
    "fill_balances",
    "keep_holds",
    "keep_other_components",
    "keep_run",
    "may_have_rows",
    "raise_hold",
    "repair_balance",
    "run_is_alive",
    "settle_owed_charge",
    "sweep_runs",
    "wait_for_turn",
}
HOSTS_OWN_PATH = "-c search_path=pg_catalog,public"


_UNCALLED = """
    SELECT p.proname FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace = CAST('trueup' AS regnamespace) AND (l.lanname = 'plpgsql' OR p.provolatile = 'v')
      AND NOT EXISTS (SELECT FROM pg_stat_user_functions f WHERE f.funcid = p.oid) ORDER BY 1
"""


@pytest.fixture
def attacked(empty_database: str, admin_engine: Engine) -> Iterator[Host]:
    """A host whose schema `public` is full of traps, in a database where all sessions look there first."""
    engine = create_engine(empty_database, poolclass=NullPool, connect_args={"options": HOSTS_OWN_PATH})
    database = engine.url.database
    with hostile.role_that_may_create(engine, f"guest_{uuid.uuid4().hex[:8]}") as role, Host(engine) as host:
        with engine.begin() as connection:
            build_host_metadata(HostMapping()).create_all(connection)
            assert hostile.set_traps(connection, role) > 1_000
        with admin_engine.connect() as admin:
            admin.execute(text(f"ALTER DATABASE {database} SET search_path = public, pg_catalog"))
            admin.execute(text(f"ALTER DATABASE {database} SET track_functions = 'all'"))
        dispose_engine()
        yield host
        dispose_engine()
    engine.dispose()


def test_each_function_that_may_run_elsewhere_has_a_fixed_search_path(host: Host) -> None:
    found = host.execute(
        "SELECT CAST(p.oid AS regprocedure)::text AS name, l.lanname AS language, p.provolatile AS volatility, "
        "coalesce(p.proconfig, '{}') AS settings, p.prosecdef AS definer "
        "FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE p.pronamespace = CAST('trueup' AS regnamespace)"
    ).all()
    assert len(found) > 80
    # The subscriptions' trigger names the schema of all that it uses: see the test below.
    others = [one for one in found if one.name != "trueup.append_window()"]
    assert len(others) == len(found) - 1
    for function in others:
        only_reads = function.language == "sql" and function.volatility in ("s", "i") and not function.definer
        assert only_reads or "search_path=pg_catalog, pg_temp" in function.settings, function.name


def test_triggers_of_the_host_find_its_tables_in_the_search_path_of_the_role(
    host: Host, connection: Connection
) -> None:
    """Deferred triggers too, which the host runs at the commit."""
    user = host.subscriber(1_000)
    host.execute(
        "CREATE TABLE public.audit (what text, tokens bigint);"
        "CREATE FUNCTION public.audited() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO audit SELECT TG_NAME, count(*) FROM ai_usage_log; RETURN NEW; END $$;"
        "CREATE TRIGGER log_before BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION audited();"
        "CREATE TRIGGER log_error BEFORE UPDATE ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION audited();"
        "CREATE CONSTRAINT TRIGGER log_deferred AFTER INSERT ON ai_usage_log DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION audited();"
        "CREATE TRIGGER counter AFTER UPDATE ON billing_subscription FOR EACH ROW EXECUTE FUNCTION audited();"
        "CREATE CONSTRAINT TRIGGER counter_deferred AFTER UPDATE ON billing_subscription DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION audited()"
    )

    def audited() -> list[str]:
        named = host.execute("DELETE FROM audit RETURNING what").scalars()
        return sorted(named)

    charge_tokens(connection, hold_tokens(connection, user, 100), 60)
    assert audited() == ["counter", "counter_deferred", "log_before", "log_deferred"]
    call = {"section": "chat", "model_name": "m", "prompt_tokens": 1, "completion_tokens": 1}
    track_ai_usage(user, key="1", success=False, error_message="refused", **call)  # type: ignore[arg-type]
    assert audited() == ["log_before", "log_deferred", "log_error"]
    host.log(user, 300)
    assert (audited(), host.counter(user)) == (["log_before", "log_deferred"], 940)
    assert reconcile(get_engine(), HostMapping()).corrected == 1
    assert (audited(), host.counter(user)) == (["counter", "counter_deferred"], 640)


def test_a_charge_leaves_the_sessions_own_search_path_alone(host: Host, connection: Connection) -> None:
    connection.execute(text("SET search_path = pg_catalog"))
    charge_tokens(connection, hold_tokens(connection, host.subscriber(1_000), 100), 60)
    assert connection.scalar(text("SHOW search_path")) == "pg_catalog"


def test_a_session_without_a_fixed_path_falls_into_the_traps(attacked: Host, empty_database: str) -> None:
    engine = create_engine(empty_database, poolclass=NullPool)

    with pytest.raises(DBAPIError, match="hostile code ran"), engine.connect() as connection:
        connection.execute(text("SELECT lower('A') || 'b'"))
    assert hostile.trapped(attacked.engine)


def test_the_trigger_of_the_subscriptions_runs_no_code_of_the_sessions_search_path(
    attacked: Host, empty_database: str
) -> None:
    host = attacked
    user = host.subscriber(10_000)
    trueup("db", "attach", "--yes")
    trueup("tokens", "grant", user, 50, "--reason", "gift", "--reference", "r1")
    plan = host.plan(5_000)
    for name in ("text", "uuid", "regclass"):
        host.execute(
            f"CREATE DOMAIN public.{name} AS pg_catalog.{name} "
            "CHECK (pg_catalog.nextval('public.trapped') OPERATOR(pg_catalog.<) 0)"
        )
    # SQLAlchemy would use operators when it connects.
    url = make_url(empty_database).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        for change in (
            "UPDATE billing_subscription SET tokens_remaining = 5",
            "UPDATE billing_subscription SET tokens_remaining = NULL",
            "UPDATE billing_subscription SET is_active = is_active",
            "UPDATE billing_subscription SET start_date = '2026-02-03', tokens_remaining = 7",
            f"UPDATE billing_subscription SET token_plan_id = {plan}",
            "DELETE FROM billing_subscription",
            (
                "INSERT INTO billing_subscription (user_id, token_plan_id, start_date, tokens_remaining) "
                f"VALUES ({user}, {plan}, '2026-02-03', 9)"
            ),
        ):
            connection.execute(change)
            assert not hostile.trapped(host.engine), change
    assert host.value("SELECT count(*) FROM trueup.counter_entry") == 6
    assert host.value("SELECT count(*) FROM trueup.window_change") > 2


def test_trueup_runs_no_code_that_others_made_in_public(attacked: Host, tmp_path: Path) -> None:
    own_application()
    host = attacked
    users = [host.subscriber(10_000) for _ in range(6)]
    for user in users:
        host.log(user, 300)
    trueup("db", "discover")
    trueup_json("drift", "report", "--read-only")
    trueup("db", "attach", "--dry-run")
    trueup("db", "attach", "--yes")
    with Host(host.engine) as writer:
        _write_as_the_host(writer, users)
    _work(users)
    _reconcile_and_decide(host, users)
    with Host(host.engine) as writer:
        writer.execute("TRUNCATE ai_usage_log")
    trueup("reconcile", "--deep")
    doctor = trueup_json("doctor", code=1)["findings"]
    # No worker runs here, and tests before this one may have left messages.
    assert {"workers"} <= {one["check"] for one in doctor if one["level"] == "error"} <= {"workers", "queues"}
    uncalled = _uncalled(host)
    assert uncalled <= NOT_CALLED, " ".join(sorted(uncalled - NOT_CALLED))
    trueup("db", "init")
    trueup("db", "detach", "--keep-history", tmp_path / "history.jsonl", "--yes", "--force")
    assert not hostile.trapped(host.engine)


def _uncalled(host: Host) -> set[str]:
    """Return the functions that no session has called. Sessions report their calls when they end."""
    dispose_engine()
    with host.engine.connect() as connection:
        return set(connection.scalars(text(_UNCALLED)))


def _write_as_the_host(host: Host, users: list[int]) -> None:
    host.log(users[1], 700)
    host.execute("UPDATE ai_usage_log SET total_tokens = 701 WHERE total_tokens = 700")
    host.execute("DELETE FROM ai_usage_log WHERE total_tokens = 701")
    host.execute(
        "UPDATE billing_subscription SET start_date = start_date + interval '1 s' WHERE user_id = :u", u=users[2]
    )
    # No deduction of this one is likely: it waits for a person.
    host.execute("UPDATE billing_subscription SET tokens_remaining = 10500 WHERE user_id = :u", u=users[4])


def _work(users: list[int]) -> None:
    model_tasks.spend.apply(kwargs={"user_id": users[0]}).get()
    call = {"section": "chat", "model_name": "m", "prompt_tokens": 1, "completion_tokens": 1}
    track_ai_usage(users[0], key="1", success=False, error_message="e", **call)  # type: ignore[arg-type]
    track_ai_usage(users[0], key="1", **call)  # type: ignore[arg-type]
    with connect() as connection:
        with pytest.raises(TokensDenied):
            hold_tokens(connection, users[0], 90_000)
        hold_tokens(connection, users[3], 100, ttl=0)
        assert expire_holds(connection)[0] == 1
        hold = hold_tokens(connection, users[3], 100, task="t", lease=60)
        with pytest.raises(HoldBusyError):
            hold_tokens(connection, users[3], 100, task="t")
        hold = hold_tokens(connection, users[3], 100, task="t", retries=1)
        assert begin_call(connection, hold, call_key="1", max_tokens=50, lease_seconds=60, ttl_seconds=60) is None
        end_call(connection, hold, call_key="1", unknown=False)
        assert keep_holds(connection, [hold], lease_seconds=60, ttl_seconds=60, max_seconds=60) == 1
        abandon_calls(connection, users[3], "t", owner=OWNER)
        extend_hold(connection, hold, 100)
        charge_tokens(connection, hold, 60, answer={"text": "a"})
        charge_tokens(connection, hold, 60)  # the same again
        prune_answers(connection, older_than=timedelta(0), limit=10)
        prune_journal(connection, older_than=timedelta(days=1), limit=10)
        shard_ends(connection, 2)
    trueup("tokens", "check", users[0], "--tokens", 10)
    trueup("tokens", "show", users[0])
    granted = trueup_json("tokens", "grant", users[0], 50, "--reason", "gift", "--reference", "r1")
    trueup("tokens", "grants", users[0])
    trueup("tokens", "revoke", users[0], granted["id"], "--reason", "error")
    trueup("rollout", "set", "Spender", "observe", "--note", "try")
    trueup("rollout", "reset", "Spender", "--note", "tried")
    for command in ("status", "holds list", "rollout list", "rollout history", f"usage list {users[0]}", "db grants"):
        trueup(*command.split())


def _reconcile_and_decide(host: Host, users: list[int]) -> None:
    found = trueup_json("reconcile")
    assert found["corrected"] > 0
    assert trueup_json("drift", "review")["drifts"]
    trueup("drift", "ignore", "--run", found["run_id"], "--yes", "--note", "known")
    trueup("drift", "undo", found["run_id"], "--note", "too early")
    trueup("reconcile", "--deep")
    for command in ("report", "history", f"explain {users[0]}"):
        trueup("drift", *command.split())
