"""Whether the provider may have served and billed a failed call, tested with real sockets."""

import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from tests.support.wire import CHUNKED_HEAD, HEAD, Script, Wire, chunk, plain, provider_at, reset, sending
from trueup.errors import AnswerFormatError, ProviderError
from trueup.llm.model import Message, Provider
from trueup.llm.transport import pools

pytestmark = pytest.mark.usefixtures("spending")

PROMPT = [Message(role="user", content="How are you?")]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

Ask = Callable[[Provider], object]


def _complete(provider: Provider) -> object:
    return provider.complete(PROMPT, max_completion_tokens=50)


def _stream(provider: Provider) -> object:
    return provider.stream(PROMPT, max_completion_tokens=50)


@pytest.fixture(params=[_complete, _stream], ids=["complete", "stream"])
def ask(request: pytest.FixtureRequest) -> Ask:
    asked: Ask = request.param
    return asked


def failure(ask: Ask, url: str, **values: object) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        ask(provider_at(url, **values))
    return caught.value


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port with a full queue of connections. The next connection waits for ever."""
    with ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = open_sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_refused_connection_was_not_served(ask: Ask) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        error = failure(ask, f"http://127.0.0.1:{bound.getsockname()[1]}/v1")
    assert "can't be reached" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, False)


def test_a_connection_that_is_not_made_in_time_was_not_served(ask: Ask, silent_port: int) -> None:
    error = failure(ask, f"http://127.0.0.1:{silent_port}/v1", model_timeout_seconds=0.2)
    assert "can't be reached" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, False)


def test_a_name_that_is_not_found_was_not_served(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **options: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = failure(ask, "http://model.invalid/v1")
    assert "Name or service not known" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, False)


def test_a_request_to_a_server_without_tls_was_not_served(ask: Ask, wire: Wire) -> None:
    error = failure(ask, f"https://127.0.0.1:{wire.port}/v1")
    assert "can't be reached" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, False)


def test_a_request_without_a_free_connection_was_not_served(
    ask: Ask, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = httpx2.HTTPTransport(limits=httpx2.Limits(max_connections=1))
    monkeypatch.setattr(pools, "_shared_transports", {("httpx2", None): one})

    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("We"))
        wire.wait_for_client_to_leave(connection)

    wire.answers(script)
    provider = provider_at(wire.url, model_timeout_seconds=0.2)
    with provider.stream(PROMPT, max_completion_tokens=50), pytest.raises(ProviderError, match="PoolTimeout") as caught:
        ask(provider)
    assert (caught.value.retryable, caught.value.outcome_unknown) == (True, False)
    assert len(wire.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 422, 429, 501, 503, 529])
def test_a_refusal_was_not_served(ask: Ask, wire: Wire, status: int) -> None:
    wire.sends(plain(status, {"error": {"message": "It is so.", "code": "x"}}))
    error = failure(ask, wire.url)
    assert f"HTTP {status}" in str(error)
    assert not error.outcome_unknown


@pytest.mark.parametrize("status", [500, 502, 504, 520])
def test_a_server_that_failed_may_have_served_the_request_and_is_not_asked_again(
    ask: Ask, wire: Wire, status: int
) -> None:
    wire.answers(*[sending(plain(status, {"error": {"message": "It is so.", "code": "x"}}))] * 3)
    error = failure(ask, wire.url, model_max_retries=2)
    assert f"HTTP {status} (It is so.)" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, True)
    assert len(wire.requests) == 1


def test_a_loop_of_redirects_was_not_served(ask: Ask, wire: Wire) -> None:
    hop = b"HTTP/1.1 308 X\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    wire.answers(*[sending(hop)] * 30)
    assert not failure(ask, wire.url).outcome_unknown


def _short_body(connection: socket.socket) -> None:
    connection.sendall(OK + b'Content-Length: 500\r\n\r\n{"choices": [')


AFTER_SENDING: dict[str, Script] = {
    "closed without an answer": sending(),
    "reset": reset,
    "closed in the head": sending(b"HTTP/1.1 200 OK\r\nContent-"),
    "closed in the body": _short_body,
    "closed in a chunked body": sending(CHUNKED_HEAD, b"ff\r\ndata: {"),
    "no HTTP": sending(b"220 mail.example ESMTP\r\n"),
    "not the encoding it says": sending(OK + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nplain"),
}


@pytest.mark.parametrize("name", AFTER_SENDING)
@pytest.mark.parametrize("retries", [0, 2])
def test_a_request_whose_connection_broke_may_have_been_served_and_is_not_retried(
    ask: Ask, wire: Wire, name: str, retries: int
) -> None:
    wire.answers(*[AFTER_SENDING[name]] * 3)
    error = failure(ask, wire.url, model_max_retries=retries)
    assert "broke" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, True)
    assert len(wire.requests) == 1


@pytest.mark.parametrize("begun", [b"", OK, OK + b'Content-Length: 500\r\n\r\n{"choices": ['], ids=repr)
@pytest.mark.parametrize("retries", [0, 2])
def test_a_request_that_timed_out_may_have_been_served_and_is_not_retried(
    ask: Ask, wire: Wire, begun: bytes, retries: int
) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(begun)
        wire.wait_for_client_to_leave(connection)

    wire.answers(*[script] * 3)
    error = failure(ask, wire.url, model_timeout_seconds=0.2, model_max_retries=retries)
    assert (error.retryable, error.outcome_unknown) == (True, True)
    assert len(wire.requests) == 1


def test_a_request_that_was_not_fully_read_may_have_been_served(silent_reader: int) -> None:
    long = [Message(role="user", content="word " * 4_000_000)]
    provider = provider_at(f"http://127.0.0.1:{silent_reader}/v1", model_timeout_seconds=0.3)
    with pytest.raises(ProviderError, match="in time") as caught:
        provider.complete(long, max_completion_tokens=50)
    assert (caught.value.retryable, caught.value.outcome_unknown) == (True, True)


@pytest.fixture
def silent_reader() -> Iterator[int]:
    """A port that accepts connections and never reads from them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [("<html>Welcome</html>", "text/html"), ("", "application/json"), ("{oops", "application/json"),
     ('{"error": {"message": "bad"}}', "application/json"), ("{}", "application/json; charset=hex")],
)  # fmt: skip
def test_a_success_without_a_completion_may_have_been_billed(
    ask: Ask, wire: Wire, body: str, content_type: str
) -> None:
    wire.sends(plain(200, body, content_type))
    error = failure(ask, wire.url)
    assert (error.retryable, error.outcome_unknown) == (False, True)


def test_a_refusal_in_an_unknown_encoding_is_a_provider_error(ask: Ask, wire: Wire) -> None:
    wire.sends(plain(404, "nothing here", "text/plain; charset=hex"))
    assert "nothing here" in str(failure(ask, wire.url))


def test_requests_that_were_not_served_are_retried_as_often_as_configured(ask: Ask, wire: Wire) -> None:
    refused = b"HTTP/1.1 503 X\r\nretry-after-ms: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    wire.answers(*[sending(refused)] * 3)
    assert not failure(ask, wire.url, model_max_retries=2).outcome_unknown
    assert len(wire.requests) == 3


@pytest.mark.parametrize("kind", [ProviderError, AnswerFormatError])
@pytest.mark.parametrize("unknown", [False, True])
def test_the_outcome_survives_pickling(kind: type[ProviderError], unknown: bool) -> None:
    error = pickle.loads(pickle.dumps(kind("no", retryable=True, outcome_unknown=unknown)))  # noqa: S301 - our own
    assert type(error) is kind
    assert (str(error), error.retryable, error.outcome_unknown) == ("no", True, unknown)
