"""No code of another role runs in trueup's sessions or functions, and the host's own triggers still find their tables."""

import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.cli.conftest import settings, trueup, trueup_json
from tests.support import hostile, model_tasks
from tests.support.host import START, Host
from tests.support.work import charge_tokens, hold_tokens
from tests.support.worker import own_application
from trueup.database.engine import connect, dispose_engine, transaction
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold, expire_holds
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import check_host
from trueup.reconcile.local_run import reconcile
from trueup.usage.log import track_ai_usage

__all__ = ["settings"]

NOT_CALLED: set[str] = set()
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


def test_a_session_without_a_fixed_path_falls_into_the_traps(attacked: Host, empty_database: str) -> None:
    engine = create_engine(empty_database, poolclass=NullPool)
    # SQLAlchemy's own first statement is one.
    with pytest.raises(Exception, match="hostile code ran"), engine.connect() as connection:
        connection.execute(text("SELECT lower('A') || 'b'"))
    assert hostile.trapped(attacked.engine)


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
    trueup("db", "init")
    with Host(host.engine) as writer:
        _write_as_the_host(writer, users)
    _work(users)
    _reconcile_and_decide(host, users)
    doctor = trueup_json("doctor", code=1)["findings"]
    assert {one["check"] for one in doctor if one["level"] == "error"} == {"workers"}
    uncalled = _uncalled(host)
    assert uncalled == NOT_CALLED, sorted(uncalled ^ NOT_CALLED)
    host.execute("TRUNCATE ai_usage_log")
    trueup("reconcile", "--deep")
    trueup("db", "detach", "--keep-history", tmp_path / "history.jsonl", "--yes")
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
    host.execute("UPDATE billing_subscription SET start_date = start_date + interval '1 s' WHERE user_id = :u", u=users[2])
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
        charge_tokens(connection, hold_tokens(connection, users[3], 100), 60)
    trueup("tokens", "check", users[0], "--tokens", 10)
    trueup("tokens", "show", users[0])
    granted = trueup_json("tokens", "grant", users[0], 50, "--reason", "gift", "--reference", "r1")
    trueup("tokens", "grants", users[0])
    trueup("tokens", "revoke", users[0], granted["id"], "--reason", "error")
    trueup("rollout", "set", "Spender", "observe", "--note", "try")
    trueup("rollout", "reset", "Spender", "--note", "tried")
    for command in ("status", "holds list", "rollout list", "rollout history", f"usage {users[0]}", "db grants"):
        trueup(*command.split())


def _reconcile_and_decide(host: Host, users: list[int]) -> None:
    found = trueup_json("reconcile")
    assert found["corrected"] > 0
    [waiting, *_] = trueup_json("drift", "review")
    trueup("drift", "ignore", waiting["id"], "--note", "known")
    trueup("drift", "undo", found["run_id"], "--note", "too early")
    trueup("reconcile", "--deep")
    for command in ("report", "history", f"explain {users[0]}"):
        trueup("drift", *command.split())
