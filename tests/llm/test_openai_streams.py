import json
import signal
import socket
import threading
from typing import Any

import pytest

from tests.support.wire import (
    CHUNKED_HEAD,
    DEADLINE_SECONDS,
    DONE,
    HEAD,
    Wire,
    chunk,
    event,
    plain,
    provider_at,
    reset,
    sending,
    usage_chunk,
)
from trueup.errors import ProviderError
from trueup.llm.model import Completion, CompletionStream, Message
from trueup.llm.tokens import EncodingCounter, count_prompt_tokens

pytestmark = pytest.mark.usefixtures("spending")

PROMPT = [Message(role="user", content="How are you?")]
USAGE = {"prompt_tokens": 21, "completion_tokens": 4, "total_tokens": 25}
COUNTER = EncodingCounter("o200k_base")
PROMPT_TOKENS = count_prompt_tokens(PROMPT, COUNTER)
WELL = (HEAD, chunk("We"), chunk("ll."), chunk(finish="stop"))


class SoftLimit(Exception):  # noqa: N818 - as Celery's is named
    pass


def read(wire: Wire, *, cap: int = 50, **values: object) -> tuple[list[str], Completion]:
    with provider_at(wire.url, **values).stream(PROMPT, max_completion_tokens=cap) as stream:
        chunks = list(stream)
        assert stream.exhausted
    return chunks, stream.completion()


def read_broken(wire: Wire, **values: object) -> tuple[list[str], ProviderError, Completion]:
    """Read a stream until it breaks."""
    chunks: list[str] = []
    stream = provider_at(wire.url, **values).stream(PROMPT, max_completion_tokens=50)
    with pytest.raises(ProviderError) as caught:
        _take_all(stream, chunks)
    assert not stream.exhausted
    assert not caught.value.outcome_unknown
    return chunks, caught.value, stream.completion()


def _take_all(stream: CompletionStream, chunks: list[str]) -> None:
    for text in stream:
        chunks.append(text)


def figures(done: Completion) -> tuple[int, int, int]:
    return done.prompt_tokens, done.completion_tokens, done.total_tokens


def counted(text: str, *, events: int = 0) -> tuple[int, int, int]:
    """Return the estimate of a received text. Each event with text has a token at least."""
    made = max(COUNTER.count(text), events)
    return PROMPT_TOKENS, made, PROMPT_TOKENS + made


@pytest.mark.parametrize("parameter", ["max_tokens", "max_completion_tokens"])
def test_a_stream_ends_with_the_usage_it_asked_for(wire: Wire, parameter: str) -> None:
    wire.sends(*WELL, usage_chunk(USAGE), DONE)
    chunks, done = read(wire, cap=77, model_max_tokens_parameter=parameter)
    assert chunks == ["We", "ll."]
    assert done.text == "Well."
    assert figures(done) == (21, 4, 25)
    assert done.model_name == "gpt-4o-mini-2024-07-18"
    assert done.usage_reported
    assert not done.truncated
    assert wire.requests[0]["stream"] is True
    assert wire.requests[0]["stream_options"] == {"include_usage": True}
    assert wire.requests[0][parameter] == 77


def test_chunks_are_yielded_as_they_arrive(wire: Wire) -> None:
    seen = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("We"))
        if seen.wait(DEADLINE_SECONDS):
            connection.sendall(chunk("ll.", finish="stop") + DONE)

    wire.answers(script)
    with provider_at(wire.url).stream(PROMPT, max_completion_tokens=50) as stream:
        assert next(stream) == "We"
        seen.set()
        assert next(stream) == "ll."


def test_a_stream_without_usage_is_counted(wire: Wire) -> None:
    wire.sends(*WELL, DONE)
    _, done = read(wire)
    assert figures(done) == counted("Well.")
    assert not done.usage_reported


def test_an_estimate_of_an_unknown_model_never_exceeds_the_cap(wire: Wire) -> None:
    wire.sends(HEAD, chunk(" word" * 400, finish="stop"), DONE)
    _, done = read(wire, cap=50, model_name="llama-3.3")
    assert (done.prompt_tokens, done.completion_tokens) == (PROMPT_TOKENS, 50)


@pytest.mark.parametrize(
    "usage",
    [None, {}, "25", [], {"prompt_tokens": -1, "completion_tokens": 4}, {"prompt_tokens": 21, "completion_tokens": 0},
     {"prompt_tokens": 21, "completion_tokens": 2**31}, {"prompt_tokens": True, "completion_tokens": 4}],
    ids=repr,
)  # fmt: skip
def test_implausible_usage_is_counted(wire: Wire, usage: object) -> None:
    wire.sends(*WELL, usage_chunk(usage), DONE)
    _, done = read(wire)
    assert figures(done) == counted("Well.")
    assert not done.usage_reported


def test_usage_above_the_cap_is_kept_as_reported(wire: Wire) -> None:
    wire.sends(*WELL, usage_chunk({"prompt_tokens": 21, "completion_tokens": 900}), DONE)
    _, done = read(wire, cap=5)
    assert figures(done) == (21, 900, 921)


def test_usage_may_come_with_the_last_text(wire: Wire) -> None:
    wire.sends(HEAD, chunk("Well.", finish="stop", usage=USAGE), DONE)
    _, done = read(wire)
    assert figures(done) == (21, 4, 25)


def test_a_stream_may_end_with_its_usage_alone(wire: Wire) -> None:
    wire.sends(HEAD, chunk("Well."), usage_chunk(USAGE), DONE)
    chunks, done = read(wire)
    assert chunks == ["Well."]
    assert figures(done) == (21, 4, 25)


def test_usage_reported_before_the_last_text_is_outdated(wire: Wire) -> None:
    early = {"prompt_tokens": 21, "completion_tokens": 1}
    wire.sends(HEAD, usage_chunk(early), chunk("We", usage=early), chunk("ll.", finish="stop"), DONE)
    _, done = read(wire)
    assert figures(done) == counted("Well.")


def test_cumulative_usage_counts_up_to_the_break_of_the_stream(wire: Wire) -> None:
    wire.sends(HEAD, chunk("We", usage=USAGE), chunk("ll.", usage=USAGE | {"completion_tokens": 6, "total_tokens": 27}))
    chunks, _, done = read_broken(wire)
    assert chunks == ["We", "ll."]
    assert figures(done) == (21, 6, 27)
    assert done.usage_reported


def test_an_answer_cut_at_the_cap_is_marked(wire: Wire) -> None:
    wire.sends(HEAD, chunk("We"), chunk(finish="length"), usage_chunk(USAGE), DONE)
    _, done = read(wire)
    assert done.truncated


def test_events_without_a_choice_or_text_add_nothing(wire: Wire) -> None:
    role = chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}])
    wire.sends(
        HEAD, b": a comment\n\n", event({"type": "ping"}), event([1]), event(b"null"), chunk(choices=[]), role,
        chunk(choices=None), chunk(choices=[None]), chunk(choices=[{}]), chunk(""), *WELL[1:], usage_chunk(USAGE), DONE,
    )  # fmt: skip
    chunks, done = read(wire)
    assert chunks == ["We", "ll."]
    assert figures(done) == (21, 4, 25)


def test_an_answer_without_text_still_returns_its_usage(wire: Wire) -> None:
    wire.sends(HEAD, chunk(finish="content_filter"), usage_chunk({"prompt_tokens": 21, "completion_tokens": 0}), DONE)
    chunks, done = read(wire)
    assert chunks == []
    assert figures(done) == (21, 0, 21)
    assert done.usage_reported


def test_reasoning_is_counted_and_is_not_part_of_the_text(wire: Wire) -> None:
    thoughts = chunk(choices=[{"delta": {"content": None, "reasoning_content": "Let me think about it."}}])
    wire.sends(HEAD, thoughts, *WELL[1:], DONE)
    chunks, done = read(wire)
    assert chunks == ["We", "ll."]
    assert done.completion_tokens == COUNTER.count("Well.") + COUNTER.count("Let me think about it.")


def test_a_character_may_be_split_between_packets(wire: Wire) -> None:
    text = "سلام 👋 čaj"
    raw = json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}, ensure_ascii=False)
    data = event(raw.encode()) + usage_chunk(USAGE) + DONE
    framed = [b"1\r\n" + data[at : at + 1] + b"\r\n" for at in range(len(data))]
    wire.sends(CHUNKED_HEAD, *framed, b"0\r\n\r\n")
    chunks, done = read(wire)
    assert chunks == [text]
    assert done.text == text


def test_a_surrogate_pair_may_be_split_over_two_chunks(wire: Wire) -> None:
    wire.sends(HEAD, chunk("Hi \ud83d"), chunk("\udc4b\ud83d"), chunk("!"), chunk("\ud83d"), chunk(finish="stop"), DONE)
    chunks, done = read(wire)
    assert chunks == ["Hi ", "👋", "\ufffd!", "\ufffd"]
    assert done.text == "Hi 👋\ufffd!\ufffd"


REFUSALS: list[tuple[int, Any]] = [
    (400, {"error": {"message": "Unrecognized request argument supplied: stream_options", "code": "x"}}),
    (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]}),
]


@pytest.mark.parametrize(("status", "body"), REFUSALS, ids=repr)
def test_after_a_refusal_of_the_usage_option_it_is_never_sent_again(wire: Wire, status: int, body: object) -> None:
    wire.answers(sending(plain(status, body)), sending(*WELL, DONE), sending(*WELL, DONE))
    provider = provider_at(wire.url)
    for _ in range(2):
        with provider.stream(PROMPT, max_completion_tokens=50) as stream:
            assert "".join(stream) == "Well."
        assert figures(stream.completion()) == counted("Well.")
    assert ["stream_options" in request for request in wire.requests] == [True, False, False]


def test_after_a_refusal_without_a_reason_the_next_stream_asks_for_usage_again(wire: Wire) -> None:
    wire.answers(sending(plain(400, "Bad Request")), sending(*WELL, DONE), sending(*WELL, usage_chunk(USAGE), DONE))
    done = [read(wire)[1].usage_reported for _ in range(2)]
    assert done == [False, True]
    assert ["stream_options" in request for request in wire.requests] == [True, False, True]


def test_a_refusal_for_another_reason_is_not_retried(wire: Wire) -> None:
    error = {"error": {"message": "Too long.", "code": "context_length_exceeded", "param": "messages"}}
    wire.sends(plain(400, error))
    with pytest.raises(ProviderError, match="Too long") as caught:
        provider_at(wire.url).stream(PROMPT, max_completion_tokens=50)
    assert not caught.value.outcome_unknown
    assert len(wire.requests) == 1


def test_a_repeated_refusal_without_a_reason_is_raised_and_the_next_stream_asks_for_usage_again(wire: Wire) -> None:
    wire.answers(sending(plain(400, "No.")), sending(plain(400, "No.")), sending(*WELL, usage_chunk(USAGE), DONE))
    provider = provider_at(wire.url)
    with pytest.raises(ProviderError, match="HTTP 400"):
        provider.stream(PROMPT, max_completion_tokens=50)
    with provider.stream(PROMPT, max_completion_tokens=50) as stream:
        list(stream)
    assert stream.completion().usage_reported


def test_a_server_without_streaming_gives_its_answer_in_one_chunk(wire: Wire) -> None:
    message = {"message": {"role": "assistant", "content": "Well."}, "finish_reason": "stop"}
    wire.sends(plain(200, {"choices": [message], "usage": USAGE, "model": "m"}))
    chunks, done = read(wire)
    assert chunks == ["Well."]
    assert figures(done) == (21, 4, 25)


BREAKS = {
    "closed": [HEAD, chunk("We"), chunk("ll")],
    "closed in a chunk": [CHUNKED_HEAD, b"%x\r\n" % 5000, chunk("We"), chunk("ll")],
    "closed in an event": [HEAD, chunk("We"), chunk("ll"), b'data: {"choices": [{"delta": {"content": "."}'],
    "no end": [HEAD, chunk("We"), chunk("ll"), DONE],
    "usage announced": [HEAD, usage_chunk(USAGE), chunk("We"), chunk("ll")],
    "no JSON": [HEAD, chunk("We"), chunk("ll"), b"data: {oops}\n\n", chunk(".", finish="stop"), DONE],
    "no UTF-8": [HEAD, chunk("We"), chunk("ll"), b"data: \xff\n\n", chunk(".", finish="stop"), DONE],
    "deep": [HEAD, chunk("We"), chunk("ll"), event(b"[" * 100_000), chunk(".", finish="stop"), DONE],
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_stream_is_an_error_and_the_received_part_is_counted(wire: Wire, name: str) -> None:
    wire.sends(*BREAKS[name])
    chunks, error, done = read_broken(wire)
    assert chunks == ["We", "ll"]
    assert "broke off" in str(error)
    assert error.retryable
    assert done.text == "Well"
    # The server has made what came behind the break, too.
    assert figures(done) in (counted("Well", events=2), counted("Well.", events=3))
    assert not done.usage_reported
    assert not done.truncated


def test_a_stream_whose_connection_is_reset_breaks(wire: Wire) -> None:
    seen = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("We"))
        seen.wait(DEADLINE_SECONDS)  # a reset discards the data that the peer has not read
        reset(connection)

    wire.answers(script)
    stream = provider_at(wire.url).stream(PROMPT, max_completion_tokens=50)
    assert next(stream) == "We"
    seen.set()
    with pytest.raises(ProviderError, match="broke off") as caught:
        next(stream)
    assert caught.value.retryable
    assert figures(stream.completion()) == counted("We")


def test_a_silent_stream_breaks_and_its_connection_is_closed(wire: Wire) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("We"))
        wire.wait_for_client_to_leave(connection)

    wire.answers(script)
    chunks, error, done = read_broken(wire, model_timeout_seconds=0.2)
    assert chunks == ["We"]
    assert error.retryable
    assert figures(done) == counted("We")
    assert wire.client_left.wait(DEADLINE_SECONDS)


def test_a_time_limit_ends_a_waiting_stream_and_the_received_part_is_counted(wire: Wire) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("We"))
        wire.wait_for_client_to_leave(connection)

    def time_is_up(*_: object) -> None:
        raise SoftLimit("time is up")

    wire.answers(script)
    stream = provider_at(wire.url).stream(PROMPT, max_completion_tokens=50)
    assert next(stream) == "We"
    handler = signal.signal(signal.SIGALRM, time_is_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(SoftLimit, match="time is up"):
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert wire.client_left.wait(DEADLINE_SECONDS)
    assert figures(stream.completion()) == counted("We")


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        ({"message": "Overloaded.", "type": "server_error"}, True),
        ({"message": "Overloaded.", "code": 502}, True),
        ({"message": "Overloaded.", "code": "insufficient_quota"}, False),
        ({"message": "Overloaded.", "code": 400}, False),
        ({"message": "Overloaded.", "type": "invalid_request_error"}, False),
    ],
    ids=repr,
)
def test_an_error_event_breaks_a_stream(wire: Wire, error: object, retryable: bool) -> None:
    wire.sends(HEAD, chunk("We"), event({"error": error}) + chunk("ll.") + DONE)
    chunks, caught, done = read_broken(wire)
    assert chunks == ["We"]
    assert "Overloaded." in str(caught)
    assert caught.retryable is retryable
    assert figures(done) == counted("Well.", events=2), "the text behind the error came with it"


def test_no_error_event_shows_the_key(wire: Wire) -> None:
    wire.sends(HEAD, chunk("We"), event({"error": {"message": "bad key sk-test-0123456789abcdef"}}))
    _, caught, _ = read_broken(wire)
    assert "sk-test" not in str(caught)
    assert caught.__context__ is None or "sk-test" not in str(caught.__cause__)


def test_a_break_after_the_end_of_the_answer_is_no_error(wire: Wire) -> None:
    wire.sends(*WELL)
    chunks, done = read(wire)
    assert chunks == ["We", "ll."]
    assert figures(done) == counted("Well.")


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_closing_early_disconnects_and_counts_the_received_part(wire: Wire, taken: int) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk("") + chunk("We") + chunk("ll"))
        wire.wait_for_client_to_leave(connection)

    wire.answers(script)
    stream = provider_at(wire.url).stream(PROMPT, max_completion_tokens=50)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert wire.client_left.wait(DEADLINE_SECONDS)
    done = stream.completion()
    assert done.text == "Well"[: taken * 2]
    assert figures(done) == counted("Well", events=2), "all of it was in the packet that was read"
    assert not done.usage_reported
    assert list(stream) == []


NOTHING = {
    "no event": ([HEAD], True, "Nothing had arrived"),
    "only the end": ([HEAD, DONE], True, "Nothing had arrived"),
    "only a ping": ([HEAD, event({"type": "ping"})], True, "Nothing had arrived"),
    "an error event": ([HEAD, event({"error": {"message": "Overloaded."}})], True, "Overloaded"),
    "a page": ([plain(200, "<p>Welcome</p>", "text/html")], False, "TRUEUP_OPENAI_BASE_URL"),
    "an error body": ([plain(200, {"error": {"message": "Sorry."}})], False, "Sorry"),
    "a broken body": ([plain(200, "[" * 100_000)[:-10]], True, "broke"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_stream_that_does_not_begin_has_an_unknown_outcome(wire: Wire, name: str) -> None:
    pieces, retryable, said = NOTHING[name]
    wire.sends(*pieces)
    with pytest.raises(ProviderError, match=said) as caught:
        provider_at(wire.url, model_max_retries=2).stream(PROMPT, max_completion_tokens=50)
    assert caught.value.outcome_unknown
    assert caught.value.retryable is retryable
    assert len(wire.requests) == 1


def test_a_refusal_whose_body_breaks_off_is_a_provider_error(wire: Wire) -> None:
    wire.sends(plain(400, "No such model, because")[:-5])
    with pytest.raises(ProviderError, match="broke"):
        provider_at(wire.url).stream(PROMPT, max_completion_tokens=50)
