"""The metered transport's cost for a call of OpenAI's SDK, compared with a bare client on a local server.

python -m benchmarks.transport [--calls 200]
"""

import argparse
import json
import multiprocessing
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
from sqlalchemy import create_engine, text

from benchmarks.common import ROUNDS, micros, own_stack, print_markdown
from trueup import http_client
from trueup.database.engine import connect
from trueup.gate.holds import Hold, open_hold
from trueup.gate.provider_calls import begin_call
from trueup.install.install import install
from trueup.llm.running import spending_from
from trueup.settings.settings import get_settings
from trueup.usage.charges import Usage, record_charge

WORDS = 50
USAGE = {"prompt_tokens": 9, "completion_tokens": WORDS, "total_tokens": 9 + WORDS}
ASK: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a question"}], "max_tokens": 100}
# A stream that asks for its usage itself, so that both clients get the same events.
ASK_STREAM: Any = ASK | {"stream": True, "stream_options": {"include_usage": True}}


class Handler(BaseHTTPRequestHandler):
    """Answers each request at once with the same completion."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_stream = bool(body.get("stream"))
        data = _events() if is_stream else _completion()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if is_stream else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        first = data.index(b"\n\n") + 2 if is_stream else len(data)
        self.wfile.write(data[:first])
        if is_stream:
            time.sleep(0.003)  # so that the first event arrives alone, as a model's does
            self.wfile.write(data[first:])


def _completion() -> bytes:
    message = {"role": "assistant", "content": " token" * WORDS}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps(
        {"id": "c", "object": "chat.completion", "model": "m", "choices": choices, "usage": USAGE}
    ).encode()


# What the database keeps of a call for a replay.
STORED_ANSWER = {"status": 200, "content_type": "application/json", "body": _completion().decode()}


def _events() -> bytes:
    base = {"id": "c", "object": "chat.completion.chunk", "model": "m"}
    chunk = base | {"choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}], "usage": None}
    last = base | {"choices": [], "usage": USAGE}
    events = [*([chunk] * WORDS), last]
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


def _serve(ports: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ports.put(server.server_address[1])
    server.serve_forever()


@contextmanager
def running_server() -> Iterator[str]:
    """Run the server in a process of its own, so that its processor time is not counted."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=_serve, args=(ports,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=60)}/v1"
    finally:
        process.terminate()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="calls of each kind in a round")
    options = parser.parse_args()
    with own_stack() as urls, running_server() as url:
        prepare(str(urls.database_url))
        with connect() as connection:
            hold = open_hold(
                connection,
                user_id=1,
                task_id=str(uuid.uuid4()),
                feature_name="F",
                section="chat",
                estimated_tokens=1_000_000_000,
                owner="me",
                lease_seconds=900,
                ttl_seconds=3600,
            )
        compare(url, hold, options.calls)


def prepare(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        install(connection, get_settings().host, with_host_tables=True)
        connection.execute(
            text("INSERT INTO billing_tokenplan (id, name, tokens_included) VALUES (1, 'plan', 2000000000)")
        )
        connection.execute(text("INSERT INTO accounts_user (id, username, email) VALUES (1, 'u', 'e')"))
        connection.execute(
            text(
                "INSERT INTO billing_subscription "
                "(id, user_id, token_plan_id, start_date, is_active, tokens_remaining) "
                "VALUES (1, 1, 1, now() - interval '1 day', true, 2000000000)"
            )
        )
    engine.dispose()


def compare(url: str, hold: Hold, calls: int) -> None:
    bare = openai.OpenAI(base_url=url, api_key="test", http_client=openai.DefaultHttpxClient())
    with spending_from(hold):
        metered = openai.OpenAI(base_url=url, api_key="test", http_client=http_client())
        ways = {
            "bare": lambda: complete(bare),
            "metered": lambda: complete(metered),
            "bare stream": lambda: stream(bare),
            "metered stream": lambda: stream(metered),
            "database": lambda: database(hold),
        }
        cpu, first = measured(ways, calls)
    rows = []
    for kind in ("", " stream"):
        added = cpu[f"metered{kind}"] - cpu[f"bare{kind}"] - cpu["database"]
        ratio = cpu[f"metered{kind}"] / cpu[f"bare{kind}"]
        figures = (cpu[f"bare{kind}"], cpu[f"metered{kind}"], cpu["database"], added)
        rows.append((kind.strip() or "complete", *map(micros, figures), f"{ratio:.2f}"))
    print_markdown(
        "An SDK's call: processor time", ["call", "bare", "metered", "database's part", "added", "ratio"], rows
    )
    delay = first["metered stream"] - first["bare stream"] - first["begin"]
    row = [*(micros(first[name]) for name in ("bare stream", "metered stream", "begin")), micros(delay)]
    print_markdown(
        "Processor time until the first event of a stream", ["bare", "metered", "begin in the database", "added"], [row]
    )


def measured(ways: dict[str, Callable[[], float]], calls: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return each way's median processor time of a call, and until its first event, in seconds."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(20):
            way()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            first[name].append(statistics.median(way() for _ in range(calls)))
            cpu[name].append((time.process_time() - started) / calls)
    events = {name: statistics.median(seconds) for name, seconds in first.items()}
    return {name: statistics.median(seconds) for name, seconds in cpu.items()}, events | {"begin": events["database"]}


def complete(client: openai.OpenAI) -> float:
    client.chat.completions.create(**ASK)
    return 0


def stream(client: openai.OpenAI) -> float:
    """Read a stream. Returns the processor seconds until its first event: a loaded machine says nothing of others."""
    started = time.process_time()
    events = iter(client.chat.completions.create(**ASK_STREAM))
    next(events)
    seconds = time.process_time() - started
    for _ in events:
        pass
    return seconds


def database(hold: Hold) -> float:
    """Begin and charge a call without the transport. Returns the processor seconds of the beginning."""
    key, started = str(uuid.uuid4()), time.process_time()
    with connect() as connection:
        begin_call(connection, hold, call_key=key, max_tokens=109, lease_seconds=90, ttl_seconds=1200)
    seconds = time.process_time() - started
    usage = Usage(prompt_tokens=9, completion_tokens=WORDS, total_tokens=9 + WORDS, response_time_ms=1, model_name="m")
    with connect() as connection:
        record_charge(
            connection, hold, call_key=key, usage=usage, metadata={"task_id": hold.task_id}, answer=STORED_ANSWER
        )
    return seconds


if __name__ == "__main__":
    main()
