"""Bodies, protocols and endings that are hard on a transport."""

import gzip
import os
import pickle
import signal
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anthropic
import h2.config
import h2.connection
import h2.events
import openai
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import Maker
from tests.support.waiting import DEADLINE_SECONDS
from tests.support.work import hold_tokens
from trueup import http_client
from trueup.gate.holds import close_hold
from trueup.gate.provider_calls import list_unrecorded_calls
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers import provider_from_settings
from trueup.llm.running import spending_from
from trueup.settings.settings import Settings

ASK: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a question"}]}


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000_000)


def charges(host: Host) -> list[int]:
    return list(host.execute("SELECT tokens_total FROM trueup.charge ORDER BY charged_at").scalars())


def sdk(maker: Maker, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{maker.url}/v1", api_key="test", http_client=http_client(**options))


def test_a_compressed_answer_is_read_and_passed_on_as_it_came(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.compresses = True
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        raw = client.chat.completions.with_raw_response.create(**ASK)
        assert raw.headers["content-encoding"] == "gzip"
        assert raw.parse().usage.total_tokens == maker.billed  # type: ignore[union-attr]
    assert charges(host) == [maker.billed]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("asks", [True, False])
def test_a_stream_that_a_server_compresses_all_the_same_is_read(
    asks: bool, encoding: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    def compressed(handler: Any) -> None:
        from tests.support.maker_formats import Chat
        from tests.support.makers import Billed, prompt_tokens

        body = maker.requests[-1]
        billed = Billed(path="", prompt=prompt_tokens(body))
        events = b"".join(Chat(maker, body, billed, "").events(True))
        maker.ledger.append(billed)
        data = gzip.compress(events) if encoding == "gzip" else zlib.compress(events)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Encoding", encoding)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    maker.other["/v1/chat/completions"] = compressed
    options: Any = {"stream_options": {"include_usage": True}} if asks else {}
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        events = list(client.chat.completions.create(**ASK, stream=True, **options))
    assert maker.headers[0]["accept-encoding"] == "identity"
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == " token" * 20
    assert charges(host) == [maker.billed]


@pytest.mark.parametrize("megabytes", [70, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("compresses", [False, True])
def test_an_answer_too_long_to_keep_is_passed_on_and_its_usage_found_at_its_end(
    compresses: bool, megabytes: int, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    row = b'{"object":"embedding","index":0,"embedding":[' + b"0.123456789," * 87_000 + b"0]},"
    head, tail = b'{"object":"list","data":[', b'{}],"model":"m","usage":{"prompt_tokens":1234,"total_tokens":1234}}'
    packer = zlib.compressobj(1, wbits=31)

    def part(data: bytes) -> bytes:
        return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH) if compresses else data

    def long(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        if compresses:
            handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Connection", "close")
        handler.end_headers()
        for data in (head, *([row] * megabytes), tail):
            handler.wfile.write(part(data))
        if compresses:
            handler.wfile.write(packer.flush())
        handler.close_connection = True

    maker.other["/v1/embeddings"] = long
    size = 0
    with spending_from(hold_tokens(connection, user, 10_000)), http_client() as client:
        ask = {"model": "text-embedding-3-small", "input": "text"}
        with client.stream("POST", f"{maker.url}/v1/embeddings", json=ask) as answer:
            for piece in answer.iter_bytes():
                size += len(piece)
    assert size == len(head) + megabytes * len(row) + len(tail)
    assert charges(host) == [1234]
    assert host.value("SELECT metadata->>'usage_reported' FROM ai_usage_log") == "true"


@contextmanager
def http2_server(answer: bytes) -> Iterator[str]:
    """Answer each request of one connection in HTTP/2, which the client must begin at once."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.settimeout(DEADLINE_SECONDS)
        state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        state.initiate_connection()
        with connection, suppress(OSError):
            connection.sendall(state.data_to_send())
            while data := connection.recv(65_536):
                for event in state.receive_data(data):
                    if isinstance(event, h2.events.StreamEnded):
                        headers = [(":status", "200"), ("content-type", "application/json")]
                        state.send_headers(event.stream_id, headers)
                        state.send_data(event.stream_id, answer, end_stream=True)
                connection.sendall(state.data_to_send())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        thread.join(DEADLINE_SECONDS)


def test_http2_is_metered(host: Host, connection: Connection, user: int) -> None:
    answer = (
        b'{"choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}'
    )
    with (
        http2_server(answer) as url,
        spending_from(hold_tokens(connection, user, 1_000)),
        http_client(http1=False, http2=True) as client,
    ):
        got = client.post(f"{url}/v1/chat/completions", json=ASK)
        assert got.http_version == "HTTP/2"
        client.close()
    assert charges(host) == [10]


def test_two_sdks_in_threads_spend_from_one_hold_and_never_more_than_it_has(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    with spending_from(hold_tokens(connection, user, 2_000)):
        claude = anthropic.Anthropic(base_url=maker.url, api_key="test", http_client=http_client())
        gpt = sdk(maker)
        asked: Any = [{"role": "user", "content": "a question"}]

        def ask_claude() -> None:
            for _ in range(4):
                claude.messages.create(model="claude-test", max_tokens=30, messages=asked)

        def ask_gpt() -> None:
            for _ in range(4):
                list(gpt.chat.completions.create(**ASK, max_tokens=30, stream=True))

        threads = [threading.Thread(target=work) for work in (ask_claude, ask_gpt)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
    assert sorted(charges(host)) == sorted(line.total for line in maker.ledger)
    assert len(maker.ledger) == 8
    assert host.used(user) == maker.billed <= 2_000


def test_a_redirect_is_followed_and_the_call_charged_where_it_is_served(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    def redirect(handler: Any) -> None:
        handler.send_response(307)
        handler.send_header("Location", f"{maker.url}/v2/chat/completions")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    maker.other["/v1/chat/completions"] = redirect
    with spending_from(hold_tokens(connection, user, 1_000)), sdk(maker) as client:
        client.chat.completions.create(**ASK)
    assert maker.paths == ["/v1/chat/completions", "/v2/chat/completions"]
    assert charges(host) == [maker.billed]
    assert not host.value("SELECT count(*) FROM trueup.call_intent")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b"", b'{"choices": "none"'])
def test_a_success_that_is_no_answer_stays_recorded_as_possibly_billed(
    body: bytes, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    maker.other["/v1/chat/completions"] = answer
    with spending_from(hold_tokens(connection, user, 1_000)), http_client() as client:
        assert client.post(f"{maker.url}/v1/chat/completions", json=ASK).content == body
    assert charges(host) == []
    assert host.value("SELECT outcome FROM trueup.call_intent") == "unknown"


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": -1}, {"prompt_tokens": "9"}, {"prompt_tokens": 0, "completion_tokens": 0}, [1], True],
)
def test_implausible_usage_is_replaced_by_an_estimate(
    usage: object, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    whole = {"choices": [{"message": {"content": " token" * 5}}], "usage": usage}
    maker.other["/v1/chat/completions"] = lambda handler: handler.send_json(whole)
    with spending_from(hold_tokens(connection, user, 1_000)), http_client() as client:
        client.post(f"{maker.url}/v1/chat/completions", json=ASK)
    assert 10 < charges(host)[0] < 20
    assert host.value("SELECT metadata->>'estimated' FROM ai_usage_log") == "true"


def test_a_total_above_its_parts_is_charged(maker: Maker, host: Host, connection: Connection, user: int) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 60}
    whole = {"choices": [{"message": {"content": " token" * 5}}], "usage": usage}
    maker.other["/v1/chat/completions"] = lambda handler: handler.send_json(whole)
    with spending_from(hold_tokens(connection, user, 1_000)), http_client() as client:
        client.post(f"{maker.url}/v1/chat/completions", json=ASK)
    assert charges(host) == [60]
    assert host.value("SELECT metadata->'tokens'->>'other' FROM ai_usage_log") == "46"


def asks_model_client(maker: Maker) -> object:
    settings = Settings(model_provider="anthropic", model_base_url=maker.url, model_name="claude-test")
    model = MeteredModel(lambda: provider_from_settings(settings))
    return model.complete([Message(role="user", content="a question")], max_completion_tokens=50)


INTERRUPTED: dict[str, tuple[str, Callable[[Maker], object]]] = {
    "openai": ("/v1/chat/completions", lambda maker: sdk(maker).chat.completions.create(**ASK)),
    "openai stream": ("/v1/chat/completions", lambda maker: sdk(maker).chat.completions.create(**ASK, stream=True)),
    "anthropic": (
        "/v1/messages",
        lambda maker: anthropic.Anthropic(
            base_url=maker.url, api_key="test", http_client=http_client()
        ).messages.create(model="claude-test", max_tokens=50, messages=ASK["messages"]),
    ),
    "the model client": ("/v1/messages", asks_model_client),
}


@pytest.mark.parametrize("way", INTERRUPTED)
def test_the_end_of_a_task_s_time_during_a_call_reaches_its_body_and_the_call_is_not_repeated(
    way: str, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    """An SDK takes any exception during its request for a broken connection, and asks again."""
    path, ask = INTERRUPTED[way]
    over = threading.Event()

    def time_is_up(*_: object) -> None:
        raise SoftTimeLimitExceeded

    def never_answer(handler: Any) -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        over.wait(DEADLINE_SECONDS)
        handler.reset()

    maker.other[path] = never_answer
    before = signal.signal(signal.SIGALRM, time_is_up)
    hold = hold_tokens(connection, user, 1_000)
    try:
        with spending_from(hold), pytest.raises(SoftTimeLimitExceeded) as raised:
            ask(maker)
    finally:
        over.set()
        signal.signal(signal.SIGALRM, before)
    assert len(maker.paths) == 1
    assert type(pickle.loads(pickle.dumps(raised.value))) is SoftTimeLimitExceeded  # noqa: S301 - our own
    assert (type(raised.value) is SoftTimeLimitExceeded) == (way == "the model client")
    close_hold(connection, hold)
    assert len(list_unrecorded_calls(connection)) == 1
