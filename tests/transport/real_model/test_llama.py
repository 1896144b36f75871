"""The metered transport on a real model: what is charged equals the server's own count. `make real-model` runs it."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.waiting import wait_for
from tests.support.work import hold_tokens
from trueup import http_client
from trueup.errors import HoldExhaustedError
from trueup.llm.formats.registry import format_of
from trueup.llm.formats.wire_format import Sent
from trueup.llm.running import spending_from
from trueup.llm.tokens import BoundCounter

MODEL = "smollm2"
TOPICS = (
    "Write a story about a fox.",
    "رنگ آسمان چیست؟",
    "Explain tides: " + "the sea rises and falls with the moon, " * 20,
    '{"name": "widget", "price": 12.5, "tags": ["a", "b"]}',
)
CALLS_OF_A_WAY, EMBEDDINGS, CLOSED_EARLY = 30, 20, 20


@dataclass(frozen=True)
class Server:
    """llama.cpp's server, and what it counts itself, over all requests."""

    url: str

    def counted(self) -> tuple[int, int]:
        """Return the tokens of all prompts, and of all answers."""
        wait_for(lambda: self._metric("requests_processing") == 0, "the server has ended its work")
        return self._metric("prompt_tokens_total"), self._metric("tokens_predicted_total")

    def _metric(self, name: str) -> int:
        found = re.search(rf"^llamacpp:{name} (\d+)", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found is not None
        return int(found.group(1))


@contextmanager
def running_server(*options: str) -> Iterator[Server]:
    program = [sys.executable, "-m", "tests.transport.real_model.server", *options]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000_000)


def gpt(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http_client())


def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", http_client=http_client())


def asked(number: int) -> Any:
    return [{"role": "user", "content": f"{TOPICS[number % len(TOPICS)]} ({number})"}]


def chat(server: Server, number: int, tokens: int) -> None:
    gpt(server).chat.completions.create(model=MODEL, messages=asked(number), max_tokens=tokens)


def chat_stream(server: Server, number: int, tokens: int) -> None:
    events = gpt(server).chat.completions.create(model=MODEL, messages=asked(number), max_tokens=tokens, stream=True)
    assert all(event.choices for event in events), "the event with the usage is hidden"


def responses(server: Server, number: int, tokens: int) -> None:
    gpt(server).responses.create(model=MODEL, input=asked(number)[0]["content"], max_output_tokens=tokens)


def responses_stream(server: Server, number: int, tokens: int) -> None:
    text = asked(number)[0]["content"]
    list(gpt(server).responses.create(model=MODEL, input=text, max_output_tokens=tokens, stream=True))


def messages(server: Server, number: int, tokens: int) -> None:
    claude(server).messages.create(model=MODEL, messages=asked(number), max_tokens=tokens)


def messages_stream(server: Server, number: int, tokens: int) -> None:
    """Ask in English: this server does not report the prompt if the first character of the answer takes two tokens."""
    list(claude(server).messages.create(model=MODEL, messages=asked(2 * number), max_tokens=tokens, stream=True))


WAYS: tuple[Callable[[Server, int, int], None], ...] = (
    *(chat, chat_stream, responses, responses_stream),
    *(messages, messages_stream),
)


def charges(host: Host) -> list[dict[str, Any]]:
    """Return the charged tokens of each call by class, with all of its tokens as `total`."""
    rows = host.execute("SELECT metadata, total_tokens FROM ai_usage_log ORDER BY created_at, id")
    return [row.metadata["tokens"] | {"total": row.total_tokens} for row in rows]


@pytest.mark.parametrize("way", WAYS)
def test_the_log_equals_the_server_s_own_count(
    way: Callable[[Server, int, int], None], server: Server, host: Host, connection: Connection, user: int
) -> None:
    before = server.counted()
    with spending_from(hold_tokens(connection, user, 1_000_000)):
        for number in range(CALLS_OF_A_WAY):
            way(server, number, 3 + number % 11)
    prompts, answers = (after - past for after, past in zip(server.counted(), before, strict=True))
    rows = charges(host)
    assert len(rows) == CALLS_OF_A_WAY
    assert sum(row["input"] for row in rows) == prompts
    assert sum(row["output"] for row in rows) == answers
    assert host.used(user) == prompts + answers
    assert not host.value("SELECT count(*) FROM ai_usage_log WHERE metadata->>'estimated' = 'true'")


def test_embeddings_are_charged_as_the_server_counts_them(host: Host, connection: Connection, user: int) -> None:
    with running_server("embeddings") as server, spending_from(hold_tokens(connection, user, 100_000)):
        reported = 0
        for number in range(EMBEDDINGS):
            texts = [asked(number + each)[0]["content"] for each in range(2)]
            answer = gpt(server).embeddings.create(model=MODEL, input=texts)
            reported += answer.usage.total_tokens
        assert host.used(user) == reported == server.counted()[0]


def close_early(stream: Any, number: int, is_text: Callable[[Any], bool]) -> None:
    """Leave a stream after 4 tokens or some more."""
    seen = 0
    for event in stream:
        seen += is_text(event)
        if seen == 4 + number % 9:
            break
    stream.close()


def test_a_stream_closed_early_is_charged_nearly_what_the_server_made_if_it_told_the_prompt(
    server: Server, host: Host, connection: Connection, user: int
) -> None:
    """The server makes a token or two more before it notices that the client has left.

    The prompts are English, for the reason that `messages_stream` gives.
    """
    made = []
    with spending_from(hold_tokens(connection, user, 1_000_000)):
        for number in range(CLOSED_EARLY):
            before = sum(server.counted())
            stream = claude(server).messages.create(model=MODEL, max_tokens=60, messages=asked(2 * number), stream=True)
            close_early(stream, number, lambda event: event.type == "content_block_delta")
            made.append(sum(server.counted()) - before)
    charged = [row["total"] for row in charges(host)]
    near = sum(abs(tokens - real) <= real / 10 for tokens, real in zip(charged, made, strict=True))
    # For docs/sdks.md.
    print(f"within 10 %: {near} of {CLOSED_EARLY}; {sum(charged)} tokens charged, {sum(made)} made")  # noqa: T201
    assert near >= 0.95 * CLOSED_EARLY


def test_a_stream_closed_early_is_marked_as_estimated_and_charged_what_was_received(
    server: Server, host: Host, connection: Connection, user: int
) -> None:
    before = sum(server.counted())
    with spending_from(hold_tokens(connection, user, 1_000_000)):
        for number in range(CLOSED_EARLY):
            stream = gpt(server).chat.completions.create(
                model=MODEL, max_tokens=60, messages=asked(number), stream=True
            )
            close_early(stream, number, lambda event: bool(event.choices and event.choices[0].delta.content))
    rows = charges(host)
    # For docs/sdks.md.
    print(f"{sum(row['total'] for row in rows)} tokens charged, {sum(server.counted()) - before} made")  # noqa: T201
    assert host.value("SELECT count(*) FROM ai_usage_log WHERE metadata->>'estimated' = 'true'") == CLOSED_EARLY
    assert all(row["output"] >= 4 + number % 9 for number, row in enumerate(rows))
    assert host.value("SELECT max(tokens_charged - tokens_reserved) FROM trueup.hold") <= 0


@pytest.mark.parametrize("more", [{}, {"n_predict": 200}, {"max_tokens": 200, "max_completion_tokens": 150}])
def test_the_server_obeys_the_cap_of_a_small_hold(
    more: dict[str, int], server: Server, host: Host, connection: Connection, user: int
) -> None:
    body = {"model": MODEL, "messages": asked(0)}
    known = format_of("/chat/completions")
    assert known is not None
    bound = known.demand(Sent(host="", path="", body=body), BoundCounter()).prompt_tokens
    with spending_from(hold_tokens(connection, user, bound)), pytest.raises(HoldExhaustedError):
        gpt(server).chat.completions.create(model=MODEL, messages=asked(0))
    before = server.counted()
    with spending_from(hold_tokens(connection, user, bound + 10)):
        answer = gpt(server).chat.completions.create(model=MODEL, messages=asked(0), extra_body=more)
    assert answer.choices[0].finish_reason == "length"
    assert server.counted()[1] - before[1] == 10
    assert host.used(user) <= bound + 10
