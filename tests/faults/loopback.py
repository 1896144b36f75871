"""The common part of the fake servers: HTTP on loopback, in threads, and closing a connection in the middle."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

# The calling process, and in it: the run of a body, and the lane of that run. A lane makes one call after the other.
PID_HEADER, RUN_HEADER, LANE_HEADER = "X-Asked-By", "X-Body-Run", "X-Body-Lane"
QUICK_SECONDS, SLOW_SECONDS = 0.03, 0.6
# How long workers wait for an answer, and how long a server stalls if it does not answer in time.
TIMEOUT_SECONDS = 1.0
STALLED_SECONDS = TIMEOUT_SECONDS + 0.4


class LoopbackServer(ThreadingHTTPServer):
    """A server on its own port. `closing` is set when it must end; then no answer waits any more."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, handler: type["LoopbackHandler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error of a killed client, which is a part of the test."""


class LoopbackHandler(BaseHTTPRequestHandler):
    """Reads and writes JSON."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: LoopbackServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing."""

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Read the request and answer it."""
        raise NotImplementedError

    @property
    def asked_by(self) -> int:
        """The pid of the calling process."""
        return int(self.headers.get(PID_HEADER, 0))

    def read(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send(self, status: int, body: str, *, bytes_sent: int | None = None) -> None:
        """Answer. `bytes_sent`: how many bytes of the body are sent; None: all."""
        content = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:bytes_sent])
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


_Server = TypeVar("_Server", bound=LoopbackServer)


@contextmanager
def running(server: _Server) -> Iterator[_Server]:
    """Run a server in a thread until the block ends."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
