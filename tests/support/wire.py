"""A model server that sends exactly the bytes of a test's script, and may disconnect its client."""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from trueup.llm.model import Provider
from trueup.llm.providers import provider_from_settings
from trueup.settings.settings import Settings

DEADLINE_SECONDS = 10
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"

Script = Callable[[socket.socket], None]


class Wire:
    """Performs one script for each connection in turn, and records the requests."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._scripts: Iterator[Script] = iter(())
        self.requests: list[dict[str, Any]] = []
        self.client_left = threading.Event()
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def answers(self, *scripts: Script) -> None:
        self._scripts = iter(scripts)

    def sends(self, *pieces: bytes) -> None:
        """Answer the one request with these bytes, each written separately, and close the connection."""
        self.answers(sending(*pieces))

    def run(self) -> None:
        with suppress(OSError):  # the test closed the listener at its end
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(DEADLINE_SECONDS)
                with connection:
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        request = read_request(connection)
        if request is None:
            return
        self.requests.append(request)
        script = next(self._scripts, None)
        if script is None:
            connection.sendall(plain(418, "no script is left"))
            return
        with suppress(OSError):  # a client may disconnect in the middle
            script(connection)

    def wait_for_client_to_leave(self, connection: socket.socket) -> None:
        try:
            left = connection.recv(1) == b""
        except ConnectionError:
            left = True
        if left:
            self.client_left.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def wire_server() -> Iterator[Wire]:
    wire = Wire()
    thread = threading.Thread(target=wire.run)
    thread.start()
    try:
        yield wire
    finally:
        wire.close()
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()


def provider_at(url: str, **values: object) -> Provider:
    known: dict[str, object] = {
        "model_provider": "openai",
        "openai_base_url": url,
        "openai_api_key": "sk-test-0123456789abcdef",
        "model_timeout_seconds": 5,
    }
    return provider_from_settings(Settings.model_validate(known | values))


def read_request(connection: socket.socket) -> dict[str, Any] | None:
    """Return the JSON of one request. None: it contains none."""
    data = b""
    while b"\r\n\r\n" not in data:
        received = connection.recv(65_536)
        if not received:
            return None
        data += received
        if not data.startswith(b"POST"):
            return None  # a TLS client's hello
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65_536)
    request: dict[str, Any] = json.loads(body)
    return request


def sending(*pieces: bytes) -> Script:
    def script(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)

    return script


def reset(connection: socket.socket) -> None:
    """Reset the connection, so that the client's next read fails."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def plain(status: int, body: object, content_type: str = "application/json") -> bytes:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + data


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chunk(content: str | None = None, *, finish: str | None = None, **values: object) -> bytes:
    """Return one chunk of a stream in OpenAI's format."""
    delta = {} if content is None else {"content": content}
    return event(
        {
            "object": "chat.completion.chunk",
            "model": "gpt-4o-mini-2024-07-18",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        | values
    )


def usage_chunk(usage: object) -> bytes:
    return chunk(choices=[], usage=usage)
