"""The providers over the SDKs of Anthropic and Google, against a server that bills, and through the model client."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import WORD, Maker, maker_server
from tests.support.work import hold_tokens
from trueup.errors import ProviderError, SettingsError
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message, Provider
from trueup.llm.providers import provider_from_settings
from trueup.llm.running import spending_from
from trueup.settings.settings import Settings

pytestmark = pytest.mark.usefixtures("spending")

PROMPT = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="How are you?"),
    Message(role="assistant", content="Well."),
    Message(role="user", content="And now?"),
]
MODELS = {"anthropic": "claude-test", "gemini": "gemini-test"}
PATHS = {
    ("anthropic", False): "/v1/messages",
    ("anthropic", True): "/v1/messages",
    ("gemini", False): "/v1/models/gemini-test:generateContent",
    ("gemini", True): "/v1/models/gemini-test:streamGenerateContent",
}

Make = Callable[..., Provider]
Ask = Callable[[Provider], object]


@pytest.fixture(scope="module")
def server() -> Iterator[Maker]:
    with maker_server() as maker:
        yield maker


@pytest.fixture
def maker(server: Maker) -> Maker:
    """The module's server with a new ledger."""
    for seen in (server.ledger, server.requests, server.headers, server.paths, server.faults, server.other):
        seen.clear()
    server.length, server.reasoning, server.pause_after = 20, 0, None
    return server


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings_for(name: str, maker: Maker, **values: object) -> Settings:
    known: dict[str, object] = {"model_provider": name, "model_name": MODELS[name], "model_base_url": maker.url}
    limits: dict[str, object] = {"model_api_key": "key-0123456789", "model_timeout_seconds": 20}
    return Settings.model_validate(known | limits | values)


@pytest.fixture
def make(name: str, maker: Maker) -> Make:
    return lambda **values: provider_from_settings(settings_for(name, maker, **values))


def complete(provider: Provider) -> object:
    return provider.complete(PROMPT, max_completion_tokens=50)


def stream(provider: Provider) -> object:
    return list(provider.stream(PROMPT, max_completion_tokens=50))


@pytest.fixture(params=[complete, stream], ids=["complete", "stream"])
def ask(request: pytest.FixtureRequest) -> Ask:
    asked: Ask = request.param
    return asked


def failure(ask: Ask, provider: Provider) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        ask(provider)
    return caught.value


def test_a_completion_has_the_text_and_the_usage_that_was_billed(make: Make, maker: Maker) -> None:
    maker.reasoning = 7
    done = make().complete(PROMPT, max_completion_tokens=50)
    assert done.text == WORD * 20
    [line] = maker.ledger
    assert (done.prompt_tokens, done.completion_tokens, done.total_tokens) == (line.prompt, 27, line.total)
    assert (done.usage_reported, done.truncated) == (True, False)
    assert done.model_name in MODELS.values()


def test_a_stream_has_the_same_text_and_usage_in_chunks(make: Make, maker: Maker) -> None:
    chunks = make().stream(PROMPT, max_completion_tokens=50)
    assert list(chunks) == [WORD] * 20
    done = chunks.completion()
    assert (done.text, done.total_tokens, done.usage_reported) == (WORD * 20, maker.billed, True)


def test_the_server_gets_the_cap_the_key_and_the_roles(name: str, make: Make, maker: Maker) -> None:
    assert len(make().complete(PROMPT, max_completion_tokens=5).text) == len(WORD * 5)
    [request], [headers] = maker.requests, maker.headers
    if name == "anthropic":
        assert (request["system"], request["max_tokens"]) == ("Be brief.", 5)
        assert [message["role"] for message in request["messages"]] == ["user", "assistant", "user"]
        assert headers.get("x-api-key", headers.get("authorization", "")).endswith("key-0123456789")
    else:
        assert request["systemInstruction"]["parts"] == [{"text": "Be brief."}]
        assert request["generationConfig"] == {"maxOutputTokens": 5}
        assert [content["role"] for content in request["contents"]] == ["user", "model", "user"]
        assert headers["x-goog-api-key"] == "key-0123456789"


def test_a_lone_surrogate_of_a_prompt_is_sent_replaced(make: Make, maker: Maker) -> None:
    prompt = [Message(role="system", content="\ud800"), Message(role="user", content="a\udfffb")]
    make().complete(prompt, max_completion_tokens=5)
    list(make().stream(prompt, max_completion_tokens=5))
    assert [str(request).count("\ufffd") for request in maker.requests] == [2, 2]


def test_a_stream_that_is_closed_early_is_counted_and_its_connection_closed(make: Make, maker: Maker) -> None:
    maker.length, maker.pause_after = 100_000, 5
    maker.resume.clear()
    maker.left.clear()
    chunks = make().stream(PROMPT, max_completion_tokens=100_000)
    assert next(chunks) == WORD
    chunks.close()
    maker.resume.set()
    assert maker.left.wait(30), "the server's next write fails"
    done = chunks.completion()
    assert not done.usage_reported
    assert done.completion_tokens >= 1


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (401, False), (404, False), (429, True), (503, True)])
def test_a_refusal_costs_nothing_and_names_what_to_do(
    status: int, retryable: bool, ask: Ask, make: Make, maker: Maker
) -> None:
    maker.faults = [status]
    error = failure(ask, make())
    assert (error.retryable, error.outcome_unknown) == (retryable, False)
    assert f"HTTP {status}" in str(error)
    assert ("TRUEUP_MODEL_API_KEY" in str(error)) == (status == 401)
    assert (f"fault {status}" in str(error)) == (status != 401)


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_server_that_failed_may_have_billed_the_call_and_is_not_asked_again(
    status: int, ask: Ask, make: Make, maker: Maker
) -> None:
    maker.faults = [status] * 3
    error = failure(ask, make(model_max_retries=2))
    assert (error.retryable, error.outcome_unknown) == (True, True)
    assert len(maker.paths) == 1


def test_a_connection_that_breaks_before_the_answer_leaves_the_usage_unknown_and_is_not_repeated(
    ask: Ask, make: Make, maker: Maker
) -> None:
    maker.faults = ["reset"]
    error = failure(ask, make(model_max_retries=2))
    assert (error.retryable, error.outcome_unknown) == (True, True)
    assert len(maker.paths) == 1


def test_an_answer_that_breaks_off_is_an_error_after_the_received_part_was_counted(make: Make, maker: Maker) -> None:
    maker.faults = ["cut"]
    chunks = make().stream(PROMPT, max_completion_tokens=50)
    with pytest.raises(ProviderError, match="broke off") as caught:
        list(chunks)
    assert not caught.value.outcome_unknown
    assert 1 <= chunks.completion().completion_tokens <= 20


def test_an_answer_that_does_not_come_in_time_ends(name: str, ask: Ask, make: Make, maker: Maker) -> None:
    over = threading.Event()

    def wait(handler: Any) -> None:
        over.wait(30)
        handler.reset()

    maker.other[PATHS[name, ask is stream]] = wait
    try:
        error = failure(ask, make(model_timeout_seconds=0.3, model_max_retries=2))
    finally:
        over.set()
    assert "did not answer in time" in str(error)
    assert error.outcome_unknown
    assert len(maker.paths) == 1


def test_an_answer_of_another_kind_leaves_the_usage_unknown(name: str, ask: Ask, make: Make, maker: Maker) -> None:
    maker.other[PATHS[name, ask is stream]] = lambda handler: handler.send_json({"hello": "world"})
    assert failure(ask, make()).outcome_unknown


def test_an_unreachable_server_is_retryable_and_nothing_was_sent(ask: Ask, make: Make) -> None:
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        error = failure(ask, make(model_base_url=f"http://127.0.0.1:{bound.getsockname()[1]}"))
    assert "TRUEUP_MODEL_BASE_URL" in str(error)
    assert (error.retryable, error.outcome_unknown) == (True, False)


def test_an_answer_without_usage_is_counted(make: Make, maker: Maker) -> None:
    maker.faults = ["silent"]
    done = make().complete(PROMPT, max_completion_tokens=50)
    assert not done.usage_reported
    assert 20 <= done.completion_tokens <= 50
    assert done.prompt_tokens >= maker.ledger[0].prompt


USUAL = {"anthropic": ["ANTHROPIC_API_KEY"], "gemini": ["GEMINI_API_KEY", "GOOGLE_API_KEY"]}


def test_the_maker_s_own_server_needs_a_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in USUAL[name]:
        monkeypatch.delenv(variable, raising=False)
    settings = Settings.model_validate({"model_provider": name, "model_name": "m"})
    with pytest.raises(SettingsError, match=f"TRUEUP_MODEL_API_KEY or {USUAL[name][0]}"):
        provider_from_settings(settings)
    for variable in USUAL[name]:
        monkeypatch.setenv(variable, "the maker's")
        provider_from_settings(settings)
        monkeypatch.delenv(variable)


def test_another_server_does_not_get_the_maker_s_key(
    name: str, make: Make, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (*USUAL[name], "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.setenv(variable, "the-makers-own")
    make(model_api_key=None).complete(PROMPT, max_completion_tokens=5)
    assert "the-makers-own" not in " ".join(maker.headers[0].values())


def test_the_model_client_charges_what_the_server_billed(
    name: str, maker: Maker, host: Host, connection: Connection
) -> None:
    settings = settings_for(name, maker)
    model = MeteredModel(lambda: provider_from_settings(settings))
    user = host.subscriber(100_000)
    with spending_from(hold_tokens(connection, user, 2_000)):
        assert model.complete(PROMPT).text == WORD * 20
        with model.stream(PROMPT, max_completion_tokens=10) as chunks:
            assert "".join(chunks) == WORD * 10
    assert len(maker.ledger) == 2
    assert host.used(user) == maker.billed
