"""What operators do to a database that trueup is attached to: restore a dump, repack the log, change an owner."""

import contextlib
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.conftest import url_of_database
from tests.install.test_rights import Site, ready, site  # noqa: F401 - fixtures
from tests.support.books import assert_true
from tests.support.dumps import programs
from tests.support.host import Host, host_of
from tests.support.postgres_versions import GIVEN, installed_versions, running_server
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import connect, dispose_engine, transaction
from trueup.errors import NotInstalledError
from trueup.gate.holds import close_hold, list_holds
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.install import install
from trueup.settings.settings import get_settings


def libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=120)


@contextlib.contextmanager
def restored(host: Host, url: str, folder: Path, *options: str) -> Iterator[tuple[str, str]]:
    """Dump a database with these options and restore it into a new one. Gives its URL and pg_restore's messages."""
    dump, name = folder / "dump", f"restored_{uuid.uuid4().hex[:8]}"
    tools = GIVEN[0] if GIVEN else programs()  # of the server's own version
    done = run(tools / "pg_dump", "--format=custom", *options, f"--file={dump}", libpq(url))
    assert done.returncode == 0, done.stderr
    host.execute(f"CREATE DATABASE {name}")
    try:
        new = url_of_database(url, name)
        yield new, run(tools / "pg_restore", f"--dbname={libpq(new)}", dump).stderr
    finally:
        dispose_engine()
        host.execute(f"DROP DATABASE {name} WITH (FORCE)")


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", url)
    dispose_engine()
    get_settings.cache_clear()


def test_a_dump_of_host_and_trueup_is_restored_with_all_that_trueup_knew(
    host: Host, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user = host.subscriber(10_000)
    host.log(user, 700)
    host.execute(
        "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_by) VALUES (:u, 500, 'gift', 'ada')", u=user
    )
    with connect() as connection:
        charge_tokens(connection, hold_tokens(connection, user, 1_000, task="before"), 300)
    with restored(host, database, tmp_path) as (url, messages), host_of(url) as new:
        assert messages == ""
        use(url, monkeypatch)
        new.log(user, 50)
        with pytest.raises(NotInstalledError, match="triggers were re-created"), connect() as connection:
            hold_tokens(connection, user, 1_000)
        attach(HostMapping())
        with connect() as connection:
            account = read_account(connection, user)
            assert account is not None
            assert (account.original, account.consumed, account.held) == (10_500, 1_050, 700)
            [hold] = list_holds(connection)
            assert (hold.task_id, hold.tokens_left) == ("before", 700)
            close_hold(connection, hold_tokens(connection, user, 1_000))
        new.log(user, 1)
        assert_true(new)


def test_a_dump_of_the_host_alone_is_restored_and_attached_from_its_log(
    host: Host, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user = host.subscriber(10_000)
    host.log(user, 700)
    with restored(host, database, tmp_path, "--exclude-schema=trueup") as (url, messages), host_of(url) as new:
        errors = [line for line in messages.splitlines() if "error: could not execute" in line]
        assert len(errors) == messages.count('schema "trueup" does not exist') == 5, messages
        use(url, monkeypatch)
        new.log(user, 50)
        with pytest.raises(NotInstalledError), connect() as connection:
            hold_tokens(connection, user, 1_000)
        attach(HostMapping())
        with connect() as connection:
            account = read_account(connection, user)
            assert account is not None
            assert (account.consumed, account.held) == (750, 0)
            close_hold(connection, hold_tokens(connection, user, 1_000))
        new.log(user, 1)
        assert_true(new)


def test_the_migrate_role_is_replaced_while_the_host_writes(ready: Site) -> None:  # noqa: F811
    user, old, new = ready.host.subscriber(10_000), ready.roles.migrate, f"mig2 {uuid.uuid4().hex[:8]}"
    ready.host.log(user, 100)

    def as_owner(*statements: str) -> None:
        with ready.owner.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    ready.roles = type(ready.roles)(migrate=new, worker=ready.roles.worker, readonly=ready.roles.readonly)
    ready.grant()
    as_owner(f'REASSIGN OWNED BY "{old}" TO "{new}"', f'DROP OWNED BY "{old}"', f'DROP ROLE "{old}"')
    ready.grant()
    # The host's tables get another owner too.
    app = ready.host.engine.url.username
    as_owner(*(f"ALTER TABLE {table} OWNER TO {app}" for table in ("ai_usage_log", "billing_subscription")))
    ready.host.log(user, 20)
    ready.become(ready.roles.worker)
    with connect() as connection:
        hold = hold_tokens(connection, user, 1_000)
        charge_tokens(connection, hold, 300)
        close_hold(connection, hold)
        account = read_account(connection, user)
        assert account is not None
        assert account.consumed == 420
    ready.become(new)
    attach(get_settings().host)
    with host_of(ready.url) as all_rights:
        assert_true(all_rights, get_settings().host)
        owners = (
            "SELECT count(*) FROM pg_proc WHERE pronamespace = 'trueup'::regnamespace AND proowner <> to_regrole(:new)"
        )
        assert all_rights.value(owners, new=f'"{new}"') == 0


REPACKS = {version: place for version, place in installed_versions().items() if (place / "pg_repack").is_file()}


@pytest.mark.parametrize("table", ["ai_usage_log", "billing_subscription"])
def test_a_rewritten_table_is_still_counted(host: Host, table: str) -> None:
    """VACUUM FULL and CLUSTER give a table a new file, as pg_repack does."""
    user = host.subscriber(10_000)
    host.log(user, 100)
    for rewrite in (f"VACUUM FULL {table}", f"CLUSTER {table} USING {table}_pkey"):
        host.execute(rewrite)
        host.log(user, 10)
        with connect() as connection:
            close_hold(connection, hold_tokens(connection, user, 1_000))
        assert_true(host)


@pytest.mark.skipif(not REPACKS, reason="NOT TESTED: no server here has pg_repack (Debian: postgresql-15-repack)")
def test_the_log_and_the_subscriptions_are_repacked_while_the_host_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = next(iter(REPACKS.values()))
    with running_server(place, tmp_path / "home") as url, host_of(url) as host:
        use(url, monkeypatch)
        host.execute("CREATE EXTENSION pg_repack")
        with transaction() as connection:
            install(connection, HostMapping(), with_host_tables=True)
        user = host.subscriber(10_000)
        for _ in range(100):
            host.log(user, 10)
        oid = host.value("SELECT 'ai_usage_log'::regclass::oid::bigint")
        parts = make_url(url)
        for table in ("ai_usage_log", "billing_subscription"):
            with host.engine.connect() as writer:
                # An open transaction of the host: pg_repack copies meanwhile and swaps when it has ended.
                writer.execute(text("UPDATE ai_usage_log SET total_tokens = 11 WHERE total_tokens = 10"))
                writer.commit()
            done = run(
                place / "pg_repack", "-h", parts.query["host"], "-p", "5432", "-U", "postgres", "-t", table, "postgres"
            )
            assert done.returncode == 0, done.stderr
            host.log(user, 1)
            with connect() as connection:
                close_hold(connection, hold_tokens(connection, user, 1_000))
                assert_true(host)
        assert host.value("SELECT 'ai_usage_log'::regclass::oid::bigint") == oid
        with connect() as connection:
            account = read_account(connection, user)
            assert account is not None
            assert account.consumed == 1_102
        dispose_engine()
