import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from tests.support.books import assert_true
from tests.support.dumps import pg_dump
from tests.support.host import Host, pooled_engine
from tests.support.sessions import backend_pid, impatient, locked
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.grants import grant_tokens
from trueup.database.engine import connect, transaction
from trueup.database.locks import HostBusyError, take_step
from trueup.errors import InvalidInputError, NotInstalledError
from trueup.gate.decision import check_access
from trueup.gate.holds import close_hold
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach, prepare
from trueup.install.detach import DetachRefusedError, detach, plan_detach, steps
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install

# Between two transactions of a writer, which would otherwise take the processors from trueup.
PAUSE_SECONDS = 0.005
WITHOUT_PATIENCE = {"patience_seconds": 0.0}


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    """A host's database without trueup."""
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
    yield engine
    engine.dispose()


def set_up(engine: Engine) -> None:
    with engine.begin() as connection:
        install(connection, HostMapping(), with_host_tables=False)


def schema_there(host: Host) -> bool:
    return bool(host.value("SELECT to_regnamespace('trueup') IS NOT NULL"))


def triggers(host: Host) -> int:
    count: int = host.value("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'trueup%'")
    return count


@contextmanager
def writing(engine: Engine, user: int) -> Iterator[list[int]]:
    """Write log rows and counters all the time from two sessions. Yields the list of tokens of all rows written."""
    written: list[int] = []
    over = threading.Event()

    def write(tokens: int) -> None:
        with Host(engine) as host:
            while not over.wait(PAUSE_SECONDS):
                with host.engine.begin() as connection:
                    connection.execute(
                        text(
                            "INSERT INTO ai_usage_log (id, user_id, section, total_tokens, success, created_at) "
                            "VALUES (gen_random_uuid(), :user, 'chat', :tokens, true, now())"
                        ),
                        {"user": user, "tokens": tokens},
                    )
                    connection.execute(
                        text(
                            "UPDATE billing_subscription SET tokens_remaining = tokens_remaining WHERE user_id = :user"
                        ),
                        {"user": user},
                    )
                written.append(tokens)

    threads = [threading.Thread(target=write, args=(tokens,)) for tokens in (3, 5)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(written) > 10, "the host to write")
        yield written
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_detach_leaves_the_host_unchanged_while_it_writes(engine: Engine, empty_database: str) -> None:
    before = pg_dump(empty_database, "--schema-only")
    with Host(engine) as host:
        user = host.subscriber()
        set_up(engine)
        assert pg_dump(empty_database, "--schema-only") != before
        with writing(engine, user) as written:
            detach()
            since = len(written)
            wait_for(lambda: len(written) > since + 10, "the host to go on")
        assert pg_dump(empty_database, "--schema-only") == before
        assert host.used(user) == sum(written)


def test_rows_of_the_host_stay_byte_for_byte(engine: Engine, empty_database: str) -> None:
    with Host(engine) as host:
        user = host.subscriber()
        host.log(user, 7)
        before = pg_dump(empty_database)
        set_up(engine)
        detach()
        assert pg_dump(empty_database) == before


def test_the_plan_names_everything_that_detach_removes(host: Host, connection: Connection) -> None:
    hold_tokens(connection, host.subscriber())
    plan = plan_detach(connection)
    assert plan.host_tables == ("public.ai_usage_log", "public.billing_subscription")
    assert (plan.triggers, plan.open_holds) == (triggers(host), 1)
    assert plan.tables > 10
    assert plan.bytes > 0
    assert schema_there(host)


def test_while_a_hold_is_open_nothing_is_removed(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    hold = hold_tokens(connection, user)
    with pytest.raises(DetachRefusedError, match=r"1 holds are open.* Nothing was removed"):
        detach()
    charge_tokens(connection, hold, 10)
    assert_true(host)
    assert detach(force=True) == {}
    assert not schema_there(host)


def test_an_expired_hold_does_not_stop_detach_unless_its_call_may_be_in_flight(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber()
    hold_tokens(connection, user)
    host.execute("UPDATE trueup.hold SET expires_at = now() - interval '1 day'")
    host.execute(
        "INSERT INTO trueup.call_intent (user_id, task_id, call_key, attempt, tokens_bound, outcome, started_at) "
        "SELECT user_id, task_id, '1', 1, 10, 'started', now() FROM trueup.hold"
    )
    with pytest.raises(DetachRefusedError):
        detach()
    host.execute("UPDATE trueup.call_intent SET outcome = 'unknown'")
    detach()
    assert not schema_there(host)


def test_the_history_is_kept(host: Host, connection: Connection, tmp_path: Path) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user), 300)
    grant_tokens(connection, user, 500, reason="sorry", reference="ticket-7", by="ada")
    file = tmp_path / "history.jsonl"
    kept = detach(history=file, force=True)
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert {table: rows for table, rows in kept.items() if rows} == {"installation": 1, "token_grant": 1, "charge": 1}
    rows = {line["table"]: line["row"] for line in lines}
    assert len(lines) == 3
    assert (rows["charge"]["user_id"], rows["charge"]["tokens_total"]) == (user, 300)
    assert (rows["token_grant"]["tokens"], rows["token_grant"]["reference"]) == (500, "ticket-7")
    assert rows["installation"]["mapping"]["usage_log"]["table"] == "ai_usage_log"
    assert file.stat().st_mode & 0o077 == 0
    assert list(tmp_path.glob("history*")) == [file]


def test_an_existing_file_is_not_overwritten(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text("mine")
    with pytest.raises(InvalidInputError, match=r"history\.jsonl exists already"):
        detach(history=file)
    with pytest.raises(InvalidInputError, match="write into folder"):
        detach(history=tmp_path / "missing" / "history.jsonl")
    assert file.read_text() == "mine"
    assert triggers(host) == 5


@pytest.mark.parametrize("taken", range(1, 4))
def test_interrupted_after_any_step_the_gate_is_closed_and_the_next_run_continues(
    host: Host, connection: Connection, tmp_path: Path, taken: int
) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user), 300)
    host.execute("UPDATE trueup.hold SET status = 'settled', closed_at = now()")
    for _, (step, tables) in zip(range(taken), steps(None, force=False, kept={}), strict=False):
        take_step(step, tables)
    with pytest.raises(NotInstalledError, match="Nothing was run"), connect() as worker:
        hold_tokens(worker, user)
    host.log(user, 20)
    assert detach(history=tmp_path / "history")["charge"] == 1
    assert not schema_there(host)
    assert triggers(host) == 0


def test_after_half_a_detach_a_new_setup_has_right_figures(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user, 0), 300)
    for _, (step, tables) in zip(range(2), steps(None, force=True, kept={}), strict=False):
        take_step(step, tables)
    host.log(user, 20)
    set_up(host.engine)
    assert_true(host)
    hold_tokens(connection, user, 0)
    assert host.value("SELECT consumed FROM trueup.balance") == 320


def test_workers_that_still_run_get_one_clear_error(host: Host) -> None:
    user = host.subscriber()
    detach()
    with pytest.raises(NotInstalledError, match=r"not ready for trueup.*Nothing was run"), connect() as worker:
        hold_tokens(worker, user)
    with pytest.raises(NotInstalledError, match="not ready for trueup"), connect() as worker:
        check_access(worker, user, 1, "Test")
    with pytest.raises(NotInstalledError, match="nothing to remove"):
        detach()


def test_a_table_that_stays_locked_ends_the_command_with_an_error(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    with locked(host, "UPDATE billing_subscription SET tokens_remaining = 1") as busy:
        with pytest.raises(HostBusyError, match=rf"locked .*billing_subscription.* process {backend_pid(busy)} "):
            detach(**WITHOUT_PATIENCE)
        # No session waits behind detach; the steps that it took stay done.
        with impatient(host) as other:
            other.execute(text("INSERT INTO accounts_user (id, username, email) VALUES (77, 'x', 'x')"))
            other.execute(text("SELECT * FROM billing_subscription"))
        assert triggers(host) == 1
    detach()
    assert not schema_there(host)
    host.log(user, 5)


def test_objects_of_others_that_depend_on_the_schema_are_named_and_kept(host: Host) -> None:
    host.execute("CREATE VIEW spending AS SELECT user_id, consumed FROM trueup.balance")
    host.execute("CREATE TABLE trueup.mine (id int)")
    with pytest.raises(DetachRefusedError, match=r"view public\.spending, table trueup\.mine\. Nothing was removed"):
        detach()
    host.execute("DROP VIEW spending; DROP TABLE trueup.mine")
    assert triggers(host) == 5
    detach()
    assert not schema_there(host)


def test_rows_written_after_half_a_detach_count_when_trueup_is_attached_again(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user, 0), 300)
    close_gate, tables = next(steps(None, force=True, kept={}))
    take_step(close_gate, tables)
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER USER")
    host.log(user, 20)
    host.execute("ALTER TABLE ai_usage_log ENABLE TRIGGER USER")
    with transaction() as again:
        prepare(again, HostMapping())
    with pytest.raises(NotInstalledError, match="is not ready for trueup"), connect() as worker:
        hold_tokens(worker, user, 0)
    attach(HostMapping())
    assert_true(host)
    hold_tokens(connection, user, 0)
    assert host.value("SELECT consumed FROM trueup.balance") == 320


def test_owed_charges_prevent_a_detach_without_force(host: Host, connection: Connection, tmp_path: Path) -> None:
    hold = hold_tokens(connection, host.subscriber(), 500)
    host.execute("ALTER TABLE ai_usage_log ADD CONSTRAINT small CHECK (total_tokens < 10)")
    charge_tokens(connection, hold, 100)
    close_hold(connection, hold)
    with pytest.raises(DetachRefusedError, match="refused the rows of 1 charges"):
        detach(**WITHOUT_PATIENCE)
    assert schema_there(host)
    assert detach(history=tmp_path / "kept.jsonl", force=True, **WITHOUT_PATIENCE)["owed_charge"] == 1
    assert not schema_there(host)
