"""A fake OpenAI-compatible server on loopback. It follows its script and keeps its own ledger."""

import json
import time
from contextlib import suppress
from typing import Any, Protocol

from tests.faults.kinds import BREAKING_KINDS, LEASE_MARGIN_SECONDS, VISIBILITY_SECONDS
from tests.faults.ledger import CHUNK_TOKENS, Ledger, Serving
from tests.faults.loopback import (
    LANE_HEADER,
    QUICK_SECONDS,
    RUN_HEADER,
    SLOW_SECONDS,
    STALLED_SECONDS,
    TIMEOUT_SECONDS,
    LoopbackHandler,
    LoopbackServer,
)
from tests.faults.prompts import read_prompt
from trueup.llm.calls import fingerprint_of
from trueup.llm.formats.registry import normal_path
from trueup.llm.model import Message
from trueup.llm.tokens import count_prompt_tokens, offline_counter

MODEL_NAME = "gpt-4o-mini"

_OVERBILLED_TOKENS = 37
# A stream that lasts longer than its hold's lease and its delivery's visibility timeout, without a stall.
_LONG_SECONDS = max(VISIBILITY_SECONDS, TIMEOUT_SECONDS + LEASE_MARGIN_SECONDS) + 1.2
_MAX_PAUSE_SECONDS = 0.7 * TIMEOUT_SECONDS


class Script(Protocol):
    """The treatment of calls. A round's plan is one."""

    def serving(self, label: str, call: int, times: int) -> str:
        """Return how a call that has come `times` times before is treated."""
        ...

    def chunks_read(self, label: str, call: int) -> int | None:
        """Return after how many chunks the caller ends a stream. None: it does not."""
        ...


class FakeProvider(LoopbackServer):
    """Answers chat completions, at once or in chunks."""

    def __init__(self, script: Script) -> None:
        super().__init__(_Handler)
        self.script = script
        self.ledger = Ledger()
        self.counter = offline_counter()


class _Handler(LoopbackHandler):
    server: FakeProvider

    def answer(self) -> None:
        request = self.read()
        prompt = request["messages"][-1]["content"]
        asked = read_prompt(prompt)
        messages = [Message(role=message["role"], content=message["content"]) for message in request["messages"]]
        prompt_tokens = count_prompt_tokens(messages, self.server.counter)
        cap = request["max_tokens"]
        serving, times = self.server.ledger.open(
            task_id=asked.task_id,
            request=asked.request,
            call=asked.call,
            fingerprint=fingerprint_of(["127.0.0.1", normal_path(self.path), _as_asked(request)]),
            user_id=asked.user_id,
            pid=self.asked_by,
            run=int(self.headers.get(RUN_HEADER, 0)),
            lane=int(self.headers.get(LANE_HEADER, 0)),
            asked=prompt_tokens + cap,
        )
        serving.prompt_tokens = prompt_tokens
        serving.streamed = bool(request.get("stream"))
        serving.chunks_read = self.server.script.chunks_read(serving.label, asked.call) if serving.streamed else None
        serving.behaviour = self.server.script.serving(serving.label, asked.call, times)
        try:
            with suppress(OSError):
                self._serve(serving, min(cap, 5 + len(prompt) % 30))
        finally:
            serving.ended_at = time.monotonic()

    def _serve(self, serving: Serving, completion_tokens: int) -> None:
        if serving.behaviour in ("http_500", "http_429"):
            status = int(serving.behaviour.removeprefix("http_"))
            self.send(status, json.dumps({"error": {"message": "not now", "code": "busy"}}))
        elif serving.behaviour == "broken_before":
            self.hang_up()
        elif serving.streamed and serving.behaviour not in ("broken_after", "not_json"):
            self._stream(serving, completion_tokens)
        else:
            self._complete(serving, completion_tokens)

    def _complete(self, serving: Serving, completion_tokens: int) -> None:
        # From here on it has done the work and bills it, even if the answer is lost.
        serving.billed = serving.prompt_tokens + completion_tokens
        if serving.behaviour == "overbilled":
            serving.billed = serving.asked + _OVERBILLED_TOKENS
        seconds = {"slow": SLOW_SECONDS, "timeout": STALLED_SECONDS}.get(serving.behaviour, QUICK_SECONDS)
        self.server.closing.wait(seconds)
        body = json.dumps(_completion(serving, " token" * completion_tokens))
        if serving.behaviour == "broken_after":
            self.hang_up()
        elif serving.behaviour == "broken_body":
            self.send(200, body, bytes_sent=len(body) // 2)
            self.hang_up()
        elif serving.behaviour == "not_json":
            self.send(200, "<html>The gateway has lost the answer.</html>")
        else:
            serving.usage_sent = serving.behaviour != "no_usage"
            self.send(200, body)
            serving.complete = True

    def _stream(self, serving: Serving, completion_tokens: int) -> None:
        """Send the answer in chunks. It bills the generated text, received or not."""
        serving.billed = serving.prompt_tokens
        if serving.behaviour == "timeout":
            self.server.closing.wait(STALLED_SECONDS)
        self._begin_events()
        self._event(_chunk(serving, {"role": "assistant", "content": ""}))
        sizes = [min(CHUNK_TOKENS, completion_tokens - sent) for sent in range(0, completion_tokens, CHUNK_TOKENS)]
        breaks_at = serving.serial % len(sizes) if serving.behaviour in BREAKING_KINDS else None
        seconds = {"slow": SLOW_SECONDS, "stream_long": _LONG_SECONDS}.get(serving.behaviour, QUICK_SECONDS)
        for place, tokens in enumerate(sizes):
            self.server.closing.wait(min(seconds / len(sizes), _MAX_PAUSE_SECONDS))
            if place == breaks_at:
                self._break_off(serving, tokens, sum(sizes[place:]))
                return
            serving.billed += tokens
            self._event(_chunk(serving, {"content": " token" * tokens}))
            serving.tokens_sent += tokens
        self._event(_chunk(serving, {}, finish="stop"))
        if serving.behaviour == "stream_usage_lost":
            self.hang_up()
            return
        if serving.behaviour == "overbilled":
            serving.billed = serving.asked + _OVERBILLED_TOKENS
        if serving.behaviour != "no_usage":
            self._event(_chunk(serving, None) | {"usage": _usage(serving)})
            serving.usage_sent = True
        self._write(b"data: [DONE]\n\n")
        self._write(b"")
        serving.complete = True

    def _break_off(self, serving: Serving, next_tokens: int, tokens_left: int) -> None:
        """Cut the connection in the middle: at once, with more text generated than sent, or after a stall."""
        if serving.behaviour == "stream_broken_unseen":
            serving.billed += tokens_left
        if serving.behaviour == "stream_stalled":
            serving.billed += next_tokens
            self.server.closing.wait(STALLED_SECONDS)
        self.hang_up()

    def _begin_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, data: dict[str, Any]) -> None:
        self._write(f"data: {json.dumps(data)}\n\n".encode())

    def _write(self, content: bytes) -> None:
        """Write one HTTP chunk. An empty one is the last."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()


def _as_asked(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request's body as its fingerprint has it: without a cap, and without what the transport adds."""
    return {name: value for name, value in request.items() if name != "stream_options"} | {"max_tokens": 0}


def _completion(serving: Serving, text: str) -> dict[str, Any]:
    body = _body(serving, "chat.completion")
    body["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    if serving.behaviour != "no_usage":
        body["usage"] = _usage(serving)
    return body


def _chunk(serving: Serving, delta: dict[str, str] | None, *, finish: str | None = None) -> dict[str, Any]:
    """Return a chunk of a stream. `delta` None: a chunk without a choice, which carries the usage."""
    body = _body(serving, "chat.completion.chunk")
    body["choices"] = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return body


def _body(serving: Serving, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{serving.serial}", "object": kind, "created": 0, "model": serving.model_name}


def _usage(serving: Serving) -> dict[str, int]:
    return {
        "prompt_tokens": serving.prompt_tokens,
        "completion_tokens": serving.billed - serving.prompt_tokens,
        "total_tokens": serving.billed,
    }
