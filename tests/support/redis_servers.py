"""Redis servers of a test's own on loopback ports: plain ones, replicas, Sentinels, and nodes of a cluster."""

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.support.waiting import DEADLINE_SECONDS, wait_for
from trueup.stack.servers.redis import find_program


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]

    @contextmanager
    def client(self) -> Iterator[redis.Redis]:
        with redis.Redis(port=self.port, decode_responses=True) as client:
            yield client

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_SECONDS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running_redis(options: str = "", *, sentinel: bool = False) -> Iterator[Server]:
    """Run a server until the block ends. `options`: lines of its configuration file."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="trueup-test-") as folder:
        file = Path(folder) / "redis.conf"
        file.write_text(f"bind 127.0.0.1\nport {port}\ndir {folder}\nprotected-mode no\n{options}\n")
        command = [find_program(Path(folder)).path, str(file), *(["--sentinel"] if sentinel else ["--save", ""])]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = Server(port, process)
        try:
            wait_for(lambda: _answers(server), "Redis answers")
            yield server
        finally:
            server.kill()


def _answers(server: Server) -> bool:
    assert server.process.poll() is None, "Redis ended"
    try:
        with server.client() as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@contextmanager
def running_sentinel(master: Server) -> Iterator[Server]:
    """Run a Sentinel that watches the master `books` alone, and replaces it after a second of silence."""
    options = f"""sentinel monitor books 127.0.0.1 {master.port} 1
        sentinel down-after-milliseconds books 1000
        sentinel failover-timeout books 5000"""
    with running_redis("\n".join(line.strip() for line in options.splitlines()), sentinel=True) as sentinel:
        yield sentinel
