"""A server that speaks the makers' wire formats, obeys caps, and keeps a ledger of what it bills.

A model's answer is the word " token", which is one token, as often as the cap allows, `length` times at most.
"""

import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.waiting import DEADLINE_SECONDS
from trueup.llm.formats.reading import strings_in
from trueup.llm.tokens import EncodingCounter

WORD = " token"
MODEL = "gpt-4o-mini-2024-07-18"
_COUNTER = EncodingCounter("o200k_base")


@dataclass
class Billed:
    """A line of the ledger. `output`: tokens of the answer that were made."""

    path: str
    prompt: int
    output: int = 0
    reasoning: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.output + self.reasoning


@dataclass
class Maker:
    """The server's behaviour and what it has seen.

    `faults`: one for each request, in turn: a status, "reset" before the answer, "cut" in the middle of it, "silent"
    about usage, or None. `pause_after`: events after which a stream waits for `resume`.
    """

    length: int = 20
    reasoning: int = 0
    cached: int = 0
    compresses: bool = False
    pause_after: int | None = None
    faults: list[int | str | None] = field(default_factory=list)
    ledger: list[Billed] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    resume: threading.Event = field(default_factory=threading.Event)
    paused: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    other: dict[str, Callable[["_Handler"], None]] = field(default_factory=dict)
    connections: set[tuple[str, int]] = field(default_factory=set)
    open_sockets: set[socket.socket] = field(default_factory=set)
    counted: int = 0
    prompt_factor: float = 1
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def billed(self) -> int:
        """The tokens of the ledger."""
        return sum(line.total for line in self.ledger)


@contextmanager
def maker_server() -> Iterator[Maker]:
    """Run a server until the block ends."""
    maker = Maker()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"maker": maker}))
    server.daemon_threads = False
    server.block_on_close = True
    maker.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield maker
    finally:
        maker.resume.set()
        server.shutdown()
        # A client keeps its connections open, and the handlers' threads would wait for the next request.
        for connection in tuple(maker.open_sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
        thread.join(DEADLINE_SECONDS)


class _Handler(BaseHTTPRequestHandler):
    maker: Maker
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = DEADLINE_SECONDS

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.maker.open_sockets.add(self.connection)

    def do_GET(self) -> None:
        self.maker.paths.append(self.path)
        self.send_json({"object": "list", "data": []})

    def do_POST(self) -> None:
        maker = self.maker
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0]
        maker.connections.add(self.client_address)
        maker.paths.append(path)
        maker.headers.append({name.lower(): value for name, value in self.headers.items()})
        with suppress(ValueError):
            maker.requests.append(json.loads(content))
        fault = maker.faults.pop(0) if maker.faults else None
        if fault == "reset":
            self.reset()
        elif isinstance(fault, int):
            self.send_json({"error": {"message": f"fault {fault}", "type": "test", "code": None}}, fault)
        elif path in maker.other:
            maker.other[path](self)
        else:
            with suppress(OSError):  # the client may leave in the middle
                self.answer(path, json.loads(content), fault)

    def answer(self, path: str, body: dict[str, Any], fault: str | None) -> None:
        from tests.support.maker_formats import format_for

        known = format_for(path)
        if known is None:
            self.send_json({"error": {"message": f"no such path {path}"}}, 404)
            return
        billed = Billed(path=path, prompt=int(self.maker.prompt_factor * prompt_tokens(body)), cached=self.maker.cached)
        answer = known(self.maker, body, billed, path)
        reports = fault != "silent"
        if answer.is_stream:
            self.maker.ledger.append(billed)
            self.send_events(answer.events(reports), cut=fault == "cut")
        else:
            whole = answer.whole(reports)
            if billed.total:
                self.maker.ledger.append(billed)
            self.send_json(whole, cut=fault == "cut")

    def send_json(self, body: object, status: int = 200, *, cut: bool = False) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if self.maker.compresses and "gzip" in self.headers.get("accept-encoding", ""):
            data = gzip.compress(data)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.reset()

    def send_events(self, events: Iterator[bytes], *, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number, event in enumerate(events):
                if number == self.maker.pause_after:
                    self.maker.paused.set()
                    self.maker.resume.wait(DEADLINE_SECONDS)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.flush()
                if cut and number == 4:
                    self.reset()
                    return
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.maker.left.set()
            self.close_connection = True

    def reset(self) -> None:
        """Reset the connection, so that the client's next read fails."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = open("/dev/null", "wb")  # noqa: SIM115 - the base class flushes and closes it

    def finish(self) -> None:
        self.maker.open_sockets.discard(self.connection)
        with suppress(OSError, ValueError):
            super().finish()


def prompt_tokens(body: dict[str, Any]) -> int:
    """Return what a prompt costs: its texts, 3 for each message, and 3 more."""
    parts = [body.get(name) for name in ("messages", "input", "contents", "system", "instructions", "requests")]
    texts = [text for part in parts for text in strings_in(part)]
    return 3 + 3 * len(body.get("messages") or ()) + sum(_COUNTER.count(text) for text in texts)
