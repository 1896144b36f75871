"""A fake OpenAI-compatible server on loopback. It does as its script says, and keeps its own ledger."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ai.model import Message
from ai.tokens import count_prompt_tokens, offline_counter
from tests.faults.ledger import Ledger, Serving

Script = Callable[[str, int, int], str]
"""Task, call, and how often it has come before: the behaviour to show."""

MODEL_NAME = "gpt-4o-mini"
MODEL_TIMEOUT_SECONDS = 1.0
PID_HEADER = "X-Asked-By"

_PROMPT = re.compile(r"task (\S+) call (\d+) user (\d+):")
_QUICK_SECONDS = 0.03
_SLOW_SECONDS = 0.6
_STALLED_SECONDS = MODEL_TIMEOUT_SECONDS + 0.4
_OVERBILLED_TOKENS = 37


def prompt_of(task_id: str, call: int, user_id: object, words: int) -> str:
    """Return a prompt that tells the provider which call it serves."""
    return f"task {task_id} call {call} user {user_id}:" + " token" * words


class FakeProvider(ThreadingHTTPServer):
    """Answers chat completions."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.ledger = Ledger()
        self.closing = threading.Event()
        self.counter = offline_counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed has hung up: that is what this is for."""


@contextmanager
def running_provider(script: Script) -> Iterator[FakeProvider]:
    """Run a provider in a thread until the block ends."""
    with FakeProvider(script) as provider:
        thread = threading.Thread(target=provider.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield provider
        finally:
            provider.closing.set()
            provider.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: FakeProvider

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        task_id, call, user_id = _PROMPT.match(prompt).groups()  # type: ignore[union-attr]
        messages = [Message(role=message["role"], content=message["content"]) for message in request["messages"]]
        prompt_tokens = count_prompt_tokens(messages, self.server.counter)
        cap = request["max_tokens"]
        serving, times = self.server.ledger.open(
            task_id=task_id,
            call=int(call),
            user_id=int(user_id),
            pid=int(self.headers.get(PID_HEADER, 0)),
            asked=prompt_tokens + cap,
        )
        serving.behaviour = self.server.script(task_id, int(call), times)
        try:
            with suppress(OSError):
                self._serve(serving, prompt_tokens, min(cap, 5 + len(prompt) % 30))
        finally:
            serving.ended_at = time.monotonic()

    def _serve(self, serving: Serving, prompt_tokens: int, completion_tokens: int) -> None:
        if serving.behaviour in ("http_500", "http_429"):
            status = int(serving.behaviour.removeprefix("http_"))
            self._send(status, json.dumps({"error": {"message": "not now", "code": "busy"}}))
            return
        if serving.behaviour == "broken_before":
            self._hang_up()
            return
        # From here on it has done the work, and bills it, whatever becomes of the answer.
        billed = completion_tokens
        if serving.behaviour == "overbilled":
            billed = serving.asked - prompt_tokens + _OVERBILLED_TOKENS
        serving.billed = prompt_tokens + billed
        seconds = {"slow": _SLOW_SECONDS, "timeout": _STALLED_SECONDS}.get(serving.behaviour, _QUICK_SECONDS)
        self.server.closing.wait(seconds)
        body = _completion(serving, prompt_tokens, billed, " token" * completion_tokens)
        if serving.behaviour == "broken_after":
            self._hang_up()
        elif serving.behaviour == "broken_body":
            self._send(200, body, bytes_sent=len(body) // 2)
            self._hang_up()
        elif serving.behaviour == "not_json":
            self._send(200, "<html>The gateway has lost the answer.</html>")
        else:
            self._send(200, body)
            serving.complete = True

    def _send(self, status: int, body: str, *, bytes_sent: int | None = None) -> None:
        content = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:bytes_sent])
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _completion(serving: Serving, prompt_tokens: int, completion_tokens: int, text: str) -> str:
    body: dict[str, Any] = {
        "id": f"chatcmpl-{serving.serial}",
        "object": "chat.completion",
        "created": 0,
        "model": serving.model_name,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
    }
    if serving.behaviour != "no_usage":
        body["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return json.dumps(body)
