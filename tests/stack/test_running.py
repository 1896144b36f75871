"""The embedded servers run while a process uses them, and their data stays."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

import trueup
from tests.stack.helpers import (
    USER,
    eventually,
    finish,
    is_initdb_at_work,
    python,
    server_pids,
    servers,
    stack_processes,
    stack_settings,
    stack_user,
    temporary_home,
)
from trueup.extras import EXTRAS
from trueup.settings import settings as billing_settings
from trueup.settings.settings import Settings
from trueup.stack import StackUrls, running_stack
from trueup.stack.errors import StackError
from trueup.stack.servers import redis as redis_server
from trueup.stack.servers.redis import find_program

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """One home for the tests that don't need a new one, because making its data takes time."""
    with temporary_home() as folder:
        yield folder


@pytest.fixture
def new_home() -> Iterator[Path]:
    with temporary_home() as folder:
        yield folder


def query(urls: StackUrls, statement: str) -> list[tuple[object, ...]]:
    assert urls.database_url is not None
    address = urls.database_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(address) as connection:
        cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


def redis(urls: StackUrls, *words: str) -> str:
    assert urls.broker_url is not None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(urls.broker_url.removeprefix("redis+socket://"))
        connection.sendall(" ".join(words).encode() + b"\r\n")
        return connection.recv(1000).decode()


def test_data_survives_until_the_next_run(home: Path) -> None:
    with running_stack(stack_settings(home)) as urls:
        query(urls, "DROP TABLE IF EXISTS kept")
        query(urls, "CREATE TABLE kept AS SELECT 42 AS answer")
        redis(urls, "SET", "kept", "42")
    assert not stack_processes(home)

    with running_stack(stack_settings(home)) as urls:
        assert query(urls, "SELECT answer FROM kept") == [(42,)]
        assert "42" in redis(urls, "GET", "kept")


def test_the_servers_listen_on_private_sockets_only(home: Path) -> None:
    with running_stack(stack_settings(home)) as urls:
        for process in stack_processes(home):
            assert process.net_connections(kind="inet") == []
        assert query(urls, "SHOW listen_addresses") == [("",)]
        for folder in ("postgres", "redis"):
            assert stat.S_IMODE((home / "run" / folder).stat().st_mode) == 0o700


def test_the_database_is_set_up_for_the_ledger(home: Path) -> None:
    with running_stack(stack_settings(home)) as urls:
        shown = {
            name: query(urls, f"SHOW {name}")[0][0]
            for name in ("fsync", "timezone", "data_checksums", "server_encoding")
        }
    assert shown == {
        "fsync": "on",
        "timezone": "UTC",
        "data_checksums": "on",
        "server_encoding": "UTF8",
    }


def test_redis_never_evicts_and_keeps_an_append_only_file(home: Path) -> None:
    with running_stack(stack_settings(home)) as urls:
        assert "noeviction" in redis(urls, "CONFIG", "GET", "maxmemory-policy")
        assert "everysec" in redis(urls, "CONFIG", "GET", "appendfsync")
        assert "yes" in redis(urls, "CONFIG", "GET", "appendonly")


def test_a_server_inherits_no_variable_and_gets_the_given_ones(
    new_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, seen = find_program(tmp_path).path, tmp_path / "seen"
    wrapper = tmp_path / "redis-server"
    wrapper.write_text(f'#!/bin/sh\nenv > {seen}\nexec {program} "$@"\n')
    tmp_path.chmod(0o755)
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TRUEUP_OPENAI_API_KEY", "secret")
    with running_stack(stack_settings(new_home), services=["redis"], environment={"GIVEN": "yes"}) as urls:
        assert "PONG" in redis(urls, "PING")
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert {"PATH", "LC_ALL", "GIVEN"} <= names <= {"PATH", "LC_ALL", "GIVEN", "PWD", "OLDPWD", "SHLVL", "_"}


def test_the_stack_file_names_exactly_the_servers_that_run(home: Path) -> None:
    settings = stack_settings(home)

    def named() -> set[str]:
        return set(json.loads(settings.stack_file.read_text()))

    with running_stack(settings, services=["redis"]) as only_redis:
        assert named() == {"broker_url"}
        assert only_redis.database_url is None
        with running_stack(settings) as both:
            assert named() == {"broker_url", "database_url"}
            assert stat.S_IMODE(settings.stack_file.stat().st_mode) == 0o600
            assert billing_settings.database_url(settings) == both.database_url
            assert billing_settings.broker_url(settings) == only_redis.broker_url
        assert named() == {"broker_url"}
    assert not settings.stack_file.exists()


def test_servers_set_by_url_are_left_alone(new_home: Path) -> None:
    settings = Settings(home=new_home, database_url="postgresql://db/x", broker_url="redis://broker/0")
    with running_stack(settings) as urls:
        assert urls.database_url == "postgresql+psycopg://db/x"
        assert urls.broker_url == "redis://broker/0"
    assert not new_home.exists()


def test_the_server_runs_until_its_last_user_has_ended(home: Path) -> None:
    with stack_user(home) as other:
        first = server_pids(home)
        with running_stack(stack_settings(home)):
            assert server_pids(home) == first
        assert server_pids(home) == first
        finish(other)
    assert not stack_processes(home)


def test_the_servers_of_a_killed_user_are_adopted(home: Path) -> None:
    with stack_user(home) as other:
        finish(other, signal.SIGKILL)
    left = server_pids(home)
    assert len(left) == 2
    with running_stack(stack_settings(home)):
        assert server_pids(home) == left
    assert not stack_processes(home)


def test_a_terminated_user_stops_the_servers(home: Path) -> None:
    with stack_user(home) as user:
        finish(user, signal.SIGTERM)
    assert not stack_processes(home)


def test_killed_servers_are_restarted_although_their_pid_is_in_use(home: Path) -> None:
    with stack_user(home) as user:
        finish(user, signal.SIGKILL)
    for pid in server_pids(home):
        os.kill(pid, signal.SIGKILL)
    postgres, _redis = servers(home)
    eventually(lambda: not stack_processes(home))
    pid_file = postgres.data / "postmaster.pid"
    owner = pid_file.stat().st_uid
    # A process of the same user. PostgreSQL, which sees only the number, takes it for a server.
    with subprocess.Popen(["sleep", "60"], user=owner if os.geteuid() == 0 else None) as stranger:
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        with running_stack(stack_settings(home)) as urls:
            assert query(urls, "SELECT 1") == [(1,)]
            assert "PONG" in redis(urls, "PING")
        assert stranger.poll() is None
        stranger.kill()


def test_many_users_at_once_start_each_server_once(new_home: Path) -> None:
    with ExitStack() as stack:
        users = [stack.enter_context(python(USER, new_home, "postgres,redis")) for _user in range(3)]
        for user in users:
            assert user.stdout is not None
            assert user.stdout.readline() == "ready\n"
        assert len(server_pids(new_home)) == 2
        for user in users:
            assert finish(user) == ""
    assert not stack_processes(new_home)
    log = (new_home / "log" / "postgres.log").read_text()
    assert log.count("ready to accept connections") == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_first_start_does_no_harm(new_home: Path, how: signal.Signals) -> None:
    with python(USER, new_home, "postgres,redis") as user:
        eventually(lambda: list(new_home.glob("postgres/new-*/PG_VERSION")))
        finish(user, how)
    if how is not signal.SIGKILL:
        assert not stack_processes(new_home)
    with running_stack(stack_settings(new_home)) as urls:
        assert query(urls, "SELECT 1") == [(1,)]
    # An orphan may have written while the folder was removed. After its end, the next start removes the rest.
    eventually(lambda: not is_initdb_at_work(new_home))
    with running_stack(stack_settings(new_home)) as urls:
        assert query(urls, "SELECT 1") == [(1,)]
        assert not list(new_home.glob("postgres/new-*"))


def test_a_path_too_long_for_a_socket_gets_a_short_private_one(new_home: Path) -> None:
    long_home = new_home / "a folder, with spaces" / ("x" * 90)
    with running_stack(stack_settings(long_home)) as urls:
        assert query(urls, "SELECT 1") == [(1,)]
        assert "PONG" in redis(urls, "PING")
        assert urls.broker_url is not None
        sockets = Path(urls.broker_url.removeprefix("redis+socket://")).parent
        assert sockets.is_relative_to(tempfile.gettempdir())
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    shutil.rmtree(sockets.parent)


def test_a_foreign_link_instead_of_the_socket_folder_is_refused(
    new_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = new_home.parent / "t"
    short.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    long_home = new_home / ("x" * 90)
    with running_stack(stack_settings(long_home), services=["redis"]):
        (ours,) = short.glob("trueup-*")
    shutil.rmtree(ours)
    (short / "theirs").mkdir()
    ours.symlink_to(short / "theirs")
    with (
        pytest.raises(StackError, match="made by someone else"),
        running_stack(stack_settings(long_home), services=["redis"]),
    ):
        pass


def test_a_server_that_cannot_start_says_why(new_home: Path) -> None:
    settings = stack_settings(new_home)
    with running_stack(settings, services=["postgres"]):
        pass
    (new_home / "postgres" / "data" / "PG_VERSION").write_text("12\n")
    with pytest.raises(StackError, match="initialized by PostgreSQL version 12") as caught:
        running_stack(settings, services=["postgres"]).__enter__()
    assert caught.value.service == "postgres"
    assert "postgres.log" in str(caught.value)
    assert not settings.stack_file.exists()


def test_a_home_that_cannot_be_made_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"file.*set TRUEUP_HOME to another folder"):
        running_stack(stack_settings(tmp_path / "file" / "home")).__enter__()


def test_a_redis_too_old_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho Redis server v=5.0.3 sha=0\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server, "_WHEEL", "no-such-package")
    with pytest.raises(StackError, match=r"version 5\.0.*TRUEUP_BROKER_URL"):
        find_program(tmp_path)


def test_without_any_redis_the_error_names_the_package_that_installs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server, "_WHEEL", "no-such-package")
    with pytest.raises(StackError, match=r"none on PATH.*pip install no-such-package.*TRUEUP_BROKER_URL"):
        find_program(tmp_path)


def test_without_a_redis_on_path_the_installed_valkey_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program = find_program(tmp_path)
    assert Path(program.path).name == "valkey-server"
    assert program.is_valkey
    assert program.version >= (9, 1)


@pytest.mark.parametrize(
    ("reported", "takes_it"),
    [("Valkey server v=9.0.0", True), ("Valkey server v=8.1.4", False), ("Redis server v=9.0.0", False)],
)
def test_only_a_valkey_with_the_option_gets_it_to_read_foreign_snapshots(
    reported: str, takes_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "valkey-server"
    program.write_text(f"#!/bin/sh\necho {reported} sha=0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(tmp_path).reads_foreign_snapshots is takes_it


def test_the_append_only_file_holds_commands_that_redis_and_valkey_both_read(new_home: Path) -> None:
    with running_stack(stack_settings(new_home), services=["redis"]) as urls:
        redis(urls, "SET", "kept", "42")
        redis(urls, "BGREWRITEAOF")
        eventually(lambda: "aof_rewrite_in_progress:0" in redis(urls, "INFO", "persistence"))
        (base,) = (new_home / "redis" / "appendonlydir").glob("*.base.*")
        assert base.read_bytes().startswith(b"*")  # a snapshot begins with the name of its server


def test_valkey_opens_the_data_of_a_newer_redis(new_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = new_home.parent / "empty"
    nowhere.mkdir()
    monkeypatch.setenv("PATH", str(nowhere))
    with running_stack(stack_settings(new_home), services=["redis"]):
        pass
    # As Redis 8 leaves it: snapshot format 12 with one string, no checksum.
    folder = new_home / "redis" / "appendonlydir"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "appendonly.aof.1.base.rdb").write_bytes(b"REDIS0012\x00\x04kept\x0242\xff" + bytes(8))
    (folder / "appendonly.aof.1.incr.aof").write_bytes(b"")
    (folder / "appendonly.aof.manifest").write_text(
        "file appendonly.aof.1.base.rdb seq 1 type b\nfile appendonly.aof.1.incr.aof seq 1 type i\n"
    )
    with running_stack(stack_settings(new_home), services=["redis"]) as urls:
        assert "42" in redis(urls, "GET", "kept")


@as_root
def test_root_leaves_a_hidden_folder_hidden_and_puts_the_data_elsewhere(new_home: Path) -> None:
    new_home.mkdir(mode=0o700)
    hidden = new_home / "home"
    for _run in range(2):  # the second run finds the folder again
        with running_stack(stack_settings(hidden), services=["postgres"]) as urls:
            assert query(urls, "SELECT 1") == [(1,)]
            ((data,),) = query(urls, "SHOW data_directory")
    elsewhere = Path((hidden / "postgres" / "location").read_text().strip())
    try:
        assert Path(str(data)).parent == elsewhere
        assert stat.S_IMODE(Path(str(data)).stat().st_mode) == 0o700
        assert stat.S_IMODE(new_home.stat().st_mode) == 0o700
        assert not elsewhere.is_relative_to(new_home)
    finally:
        shutil.rmtree(elsewhere)


def copy_for_everybody(target: Path) -> Path:
    """Copy trueup and the imports of its stack into a folder that every user can read. A checkout may be in /root."""
    script = "import sys, psycopg, redis, trueup.stack; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    site = Path(psycopg.__file__).parents[1]
    packages = [Path(trueup.__file__).parent]
    for name in {*imported, *EXTRAS["embedded"]} - {"trueup"}:
        packages += [*site.glob(name), *site.glob(f"{name}.*"), *site.glob(f"{name}-*")]
    target.mkdir()
    subprocess.run(["cp", "-RL", "--preserve=timestamps", *packages, target], check=True)  # their bytecode stays valid
    subprocess.run(["chmod", "-R", "a+rX", target], check=True)
    return target


@as_root
def test_an_ordinary_user_runs_the_servers(new_home: Path) -> None:
    other_user = 65534
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = shutil.which(name, path="/usr/bin:/usr/local/bin")
    if interpreter is None:
        pytest.skip(f"there is no {name} that other users can run")
    new_home.mkdir()
    os.chown(new_home, other_user, other_user)
    result = subprocess.run(
        [interpreter, "-W", "ignore", "-c", USER, str(new_home / "home"), "postgres,redis"],
        input="",
        capture_output=True,
        text=True,
        user=other_user,
        group=other_user,
        extra_groups=[],
        cwd="/",
        env={"PYTHONPATH": str(copy_for_everybody(new_home.parent / "code")), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=120,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("ready\n", "")
    assert (new_home / "home" / "postgres" / "data").stat().st_uid == other_user
    with pytest.raises(StackError, match="belongs to another user"):
        running_stack(stack_settings(new_home / "home")).__enter__()
