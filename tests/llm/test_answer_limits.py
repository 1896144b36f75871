"""What a model server may take of time and memory for one answer, and what an answer without usage may cost."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from tests.support.host import Host
from tests.support.wire import DONE, HEAD, Wire, chunk, plain, provider_at
from trueup.errors import ProviderError
from trueup.llm.model import Message
from trueup.llm.providers import paying_client

pytestmark = pytest.mark.usefixtures("spending")

PROMPT = [Message(role="user", content="How are you?")]
LIMIT_SECONDS = 0.5
# For a process to start on a loaded machine.
PROCESS_SECONDS = 120
# A drip comes more often than that, so that no single wait is long.
DRIP_SECONDS = 0.05


def dripping(head: bytes, drop: bytes) -> Any:
    def script(connection: socket.socket) -> None:
        connection.sendall(head)
        # The client leaves long before: sending then fails, which ends this.
        for _ in range(int(60 / DRIP_SECONDS)):
            connection.sendall(drop)
            time.sleep(DRIP_SECONDS)

    return script


def test_an_answer_that_drips_ends_when_its_time_is_over(wire: Wire) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    wire.answers(dripping(head, b" "))
    provider = provider_at(wire.url, model_timeout_seconds=LIMIT_SECONDS, model_max_retries=2)
    started = time.monotonic()
    with pytest.raises(ProviderError, match=r"did not answer in time.*TRUEUP_MODEL_TIMEOUT_SECONDS") as raised:
        provider.complete(PROMPT, max_completion_tokens=50)
    assert time.monotonic() - started < 30
    assert raised.value.outcome_unknown
    assert len(wire.requests) == 1


@pytest.mark.parametrize("drop", [b": still here\n\n", b"\n", b"d"], ids=repr)
def test_a_stream_without_events_ends_when_its_time_is_over_whatever_else_it_sends(wire: Wire, drop: bytes) -> None:
    wire.answers(dripping(HEAD + chunk("We"), drop))
    stream = provider_at(wire.url, model_timeout_seconds=LIMIT_SECONDS).stream(PROMPT, max_completion_tokens=50)
    started = time.monotonic()
    with pytest.raises(ProviderError, match=r"broke off its answer.*received part is charged"):
        list(stream)
    assert time.monotonic() - started < 30
    assert stream.completion().completion_tokens > 0


def test_a_stream_that_stops_ends_when_its_time_is_over_though_one_wait_may_take_longer(wire: Wire) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("We"))
        wire.wait_for_client_to_leave(connection)

    wire.answers(script)
    stream = provider_at(wire.url, model_timeout_seconds=LIMIT_SECONDS).stream(PROMPT, max_completion_tokens=50)
    with pytest.raises(ProviderError, match="broke off"):
        list(stream)


def test_a_stream_of_events_may_take_longer_than_any_of_them(wire: Wire) -> None:
    events = 3 * round(LIMIT_SECONDS / DRIP_SECONDS)

    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        for _ in range(events):
            connection.sendall(chunk("a"))
            time.sleep(DRIP_SECONDS)
        connection.sendall(chunk(finish="stop") + DONE)

    wire.answers(script)
    stream = provider_at(wire.url, model_timeout_seconds=LIMIT_SECONDS).stream(PROMPT, max_completion_tokens=50)
    assert "".join(stream) == "a" * events


def test_an_answer_of_any_length_takes_no_more_memory_than_the_longest_allowed(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paying_client, "MAX_ANSWER_BYTES", 2**20)
    text = "x" * 2**21
    wire.sends(plain(200, {"choices": [{"message": {"content": text}}]}))
    with pytest.raises(ProviderError, match="longer than 1,048,576 bytes") as raised:
        provider_at(wire.url).complete(PROMPT, max_completion_tokens=50)
    assert raised.value.outcome_unknown


@pytest.mark.parametrize("model", ["gpt-4o-mini", "llama-3.3"])
def test_an_answer_without_usage_is_charged_at_most_what_was_asked_for(wire: Wire, model: str) -> None:
    content = " word" * 100_000
    wire.sends(plain(200, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}))
    done = provider_at(wire.url, model_name=model).complete(PROMPT, max_completion_tokens=50)
    assert (done.completion_tokens, done.usage_reported) == (50, False)


@pytest.mark.parametrize(
    ("way", "before", "after"),
    [
        ("stream", [HEAD, chunk("We")], [chunk("ll"), chunk("."), chunk(finish="stop"), DONE]),
        ("complete", [], [plain(200, {"choices": [{"message": {"content": "Well."}, "finish_reason": "stop"}]})]),
    ],
    ids=["stream", "complete"],
)
def test_an_answer_that_comes_while_the_process_is_stopped_is_read_to_its_end(
    wire: Wire, host: Host, way: str, before: list[bytes], after: list[bytes]
) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(b"".join(before))
        begun.set()
        stopped.wait(PROCESS_SECONDS)
        connection.sendall(b"".join(after))

    wire.answers(script)
    command = [sys.executable, "-m", "tests.support.one_answer", wire.url, way, str(LIMIT_SECONDS)]
    command.append(str(host.subscriber(10_000)))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert begun.wait(PROCESS_SECONDS)
            process.send_signal(signal.SIGSTOP)
            stopped.set()
            time.sleep(3 * LIMIT_SECONDS)
            process.send_signal(signal.SIGCONT)
            output, _ = process.communicate(timeout=PROCESS_SECONDS)
        finally:
            stopped.set()
            process.kill()
    assert json.loads(output) == {"text": "Well."}
