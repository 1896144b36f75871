import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from trueup.errors import ProviderError, SettingsError
from trueup.llm.model import Completion, Message, Provider
from trueup.llm.providers import provider_from_settings
from trueup.llm.tokens import EncodingCounter, count_prompt_tokens
from trueup.settings.settings import Settings

pytestmark = pytest.mark.usefixtures("spending")

KEY = "sk-test-0123456789abcdef"
PATH = "/v1/chat/completions"
PROMPT = [Message(role="system", content="Be brief."), Message(role="user", content="How are you?")]
USAGE = {"prompt_tokens": 21, "completion_tokens": 4, "total_tokens": 25}

MakeProvider = Callable[..., Provider]


@pytest.fixture
def make(httpserver: HTTPServer) -> MakeProvider:
    def make(**values: object) -> Provider:
        known: dict[str, object] = {
            "model_provider": "openai",
            "openai_base_url": httpserver.url_for("/v1"),
            "openai_api_key": KEY,
            "model_max_retries": 0,
            "model_timeout_seconds": 5,
        }
        return provider_from_settings(Settings.model_validate(known | values))

    return make


def _body(**values: object) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1763802471,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Well."}, "finish_reason": "stop"}],
        "usage": USAGE,
    } | values


def _choice(content: object, **values: object) -> list[dict[str, object]]:
    return [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"} | values]


def _complete(provider: Provider, cap: int = 50) -> Completion:
    return provider.complete(PROMPT, max_completion_tokens=cap)


def test_a_completion_has_the_text_and_the_billed_usage(httpserver: HTTPServer, make: MakeProvider) -> None:
    httpserver.expect_oneshot_request(PATH, method="POST").respond_with_json(_body())
    done = _complete(make())
    assert done.text == "Well."
    assert (done.prompt_tokens, done.completion_tokens, done.total_tokens) == (21, 4, 25)
    assert done.model_name == "gpt-4o-mini-2024-07-18"
    assert done.usage_reported
    assert not done.truncated
    assert done.response_time_ms >= 0


@pytest.mark.parametrize(
    ("usage", "figures"),
    [
        ({"prompt_tokens": 21.0, "completion_tokens": 4.0, "total_tokens": 500.0}, (21, 479, 500)),
        ({"input_tokens": 21, "output_tokens": 4}, (21, 4, 25)),
        ({"input_tokens": 21.0, "output_tokens": 4, "total_tokens": 25}, (21, 4, 25)),
        ({"prompt_tokens": None, "completion_tokens": None, "input_tokens": 21, "output_tokens": 4}, (21, 4, 25)),
        ({"prompt_tokens": 21, "completion_tokens": 4, "input_tokens": 99}, (21, 4, 25)),
    ],
    ids=repr,
)
def test_usage_in_other_forms_is_taken(
    httpserver: HTTPServer, make: MakeProvider, usage: object, figures: tuple[int, int, int]
) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(usage=usage))
    done = _complete(make())
    assert (done.prompt_tokens, done.completion_tokens, done.total_tokens) == figures
    assert done.usage_reported


@pytest.mark.parametrize("parameter", ["max_tokens", "max_completion_tokens"])
def test_the_cap_is_sent_under_the_configured_name_only(
    httpserver: HTTPServer, make: MakeProvider, parameter: str
) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body())
    _complete(make(model_max_tokens_parameter=parameter, model_name="gpt-5-mini"), cap=77)
    request, _ = httpserver.log[0]
    sent = json.loads(request.data)
    assert sent[parameter] == 77
    assert len({"max_tokens", "max_completion_tokens"} & set(sent)) == 1
    assert sent["model"] == "gpt-5-mini"
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"},
    ]  # fmt: skip
    assert request.headers["Authorization"] == f"Bearer {KEY}"


def test_an_answer_cut_at_the_cap_is_marked(httpserver: HTTPServer, make: MakeProvider) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(choices=_choice("We", finish_reason="length")))
    assert _complete(make()).truncated


@pytest.mark.parametrize(
    "choices", [[], None, _choice(None), _choice(""), [{}], [None], "none", [{"message": None}]], ids=repr
)
def test_an_answer_without_text_still_returns_its_usage(
    httpserver: HTTPServer, make: MakeProvider, choices: object
) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(
        _body(choices=choices, usage=USAGE | {"completion_tokens": 0, "total_tokens": 21})
    )
    done = _complete(make())
    assert done.text == ""
    assert done.total_tokens == 21
    assert done.usage_reported


def test_content_in_parts_is_joined(httpserver: HTTPServer, make: MakeProvider) -> None:
    parts = [{"type": "text", "text": "We"}, {"type": "text", "text": "ll."}]
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(choices=_choice(parts)))
    assert _complete(make()).text == "Well."


def test_a_total_above_the_sum_is_kept_because_reasoning_is_billed(httpserver: HTTPServer, make: MakeProvider) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(usage=USAGE | {"total_tokens": 90}))
    assert _complete(make()).total_tokens == 90


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        "25",
        {"prompt_tokens": -1, "completion_tokens": 4},
        {"prompt_tokens": 21.5, "completion_tokens": 4},
        {"prompt_tokens": "21", "completion_tokens": 4},
        {"prompt_tokens": True, "completion_tokens": 4},
        {"prompt_tokens": 21, "completion_tokens": 2**31},
        {"prompt_tokens": 21, "completion_tokens": 4, "total_tokens": 2**40},
        {"prompt_tokens": 21, "completion_tokens": 4, "total_tokens": -25},
        {"prompt_tokens": 2**31 - 1, "completion_tokens": 2**31 - 1},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 21},
        {"prompt_tokens": None, "completion_tokens": None},
    ],
    ids=repr,
)
def test_missing_or_implausible_usage_is_counted_here(
    httpserver: HTTPServer, make: MakeProvider, usage: object
) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(usage=usage))
    done = _complete(make())
    counter = EncodingCounter("o200k_base")
    assert not done.usage_reported
    assert done.prompt_tokens == count_prompt_tokens(PROMPT, counter)
    assert done.completion_tokens == counter.count("Well.")
    assert done.total_tokens == done.prompt_tokens + done.completion_tokens


def test_an_estimate_of_an_unknown_model_never_exceeds_the_cap(httpserver: HTTPServer, make: MakeProvider) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(usage=None, choices=_choice(" word" * 400)))
    done = _complete(make(model_name="llama-3.3"), cap=50)
    assert done.completion_tokens == 50
    assert done.prompt_tokens == count_prompt_tokens(PROMPT, EncodingCounter("o200k_base"))


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(400, False), (401, False), (403, False), (404, False), (422, False), (408, True), (409, True), (429, True),
     (500, True), (502, True), (503, True)],
)  # fmt: skip
def test_a_refusal_says_whether_a_retry_may_succeed(
    httpserver: HTTPServer, make: MakeProvider, status: int, retryable: bool
) -> None:
    error = {"error": {"message": "It is so.", "type": "x", "code": None}}
    httpserver.expect_request(PATH).respond_with_json(error, status=status)
    with pytest.raises(ProviderError, match=f"HTTP {status}") as caught:
        _complete(make())
    assert caught.value.retryable is retryable
    assert caught.value.__cause__ is None


def test_no_error_shows_the_key(httpserver: HTTPServer, make: MakeProvider) -> None:
    for status in (400, 401, 403, 500):
        error = {"error": {"message": f"Incorrect API key provided: {KEY}."}}
        httpserver.expect_oneshot_request(PATH).respond_with_json(error, status=status)
        with pytest.raises(ProviderError) as caught:
            _complete(make())
        assert KEY not in str(caught.value)
        assert "TRUEUP_" in str(caught.value) or status == 500


def test_an_account_without_credit_is_not_retryable(httpserver: HTTPServer, make: MakeProvider) -> None:
    error = {"error": {"message": "You exceeded your quota.", "code": "insufficient_quota"}}
    httpserver.expect_request(PATH).respond_with_json(error, status=429)
    with pytest.raises(ProviderError, match="no credit") as caught:
        _complete(make())
    assert not caught.value.retryable


def test_a_rate_limited_call_is_retried_as_often_as_configured(httpserver: HTTPServer, make: MakeProvider) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data(status=429, headers={"retry-after-ms": "1"})
    httpserver.expect_ordered_request(PATH).respond_with_json(_body())
    assert _complete(make(model_max_retries=1)).text == "Well."
    assert len(httpserver.log) == 2


@pytest.mark.parametrize(
    ("data", "content_type"),
    [("<html>Welcome</html>", "text/html"), ("", "application/json"), ("{oops", "application/json"),
     ("[1]", "application/json"), ('{"status": "ok"}', "application/json"), ("[" * 50_000, "application/json"),
     ('{"error": {"message": "bad"}}', "application/json")],
    ids=["html", "empty", "broken", "list", "other", "deep", "error"],
)  # fmt: skip
def test_a_success_without_a_completion_is_an_error(
    httpserver: HTTPServer, make: MakeProvider, data: str, content_type: str
) -> None:
    httpserver.expect_request(PATH).respond_with_data(data, content_type=content_type)
    with pytest.raises(ProviderError, match="TRUEUP_OPENAI_BASE_URL") as caught:
        _complete(make())
    assert not caught.value.retryable


def test_an_answer_behind_a_redirect_that_becomes_a_get_has_an_unknown_outcome(
    httpserver: HTTPServer, make: MakeProvider
) -> None:
    httpserver.expect_oneshot_request(PATH, method="POST").respond_with_data(status=303, headers={"location": "/other"})
    httpserver.expect_oneshot_request("/other", method="GET").respond_with_json(_body())
    with pytest.raises(ProviderError, match="usage is unknown") as caught:
        _complete(make())
    assert caught.value.outcome_unknown


def test_a_timeout_is_retryable(httpserver: HTTPServer, make: MakeProvider) -> None:
    asked_too_long = threading.Event()

    def wait(request: Request) -> Response:
        asked_too_long.wait(10)
        return Response(status=204)

    httpserver.expect_request(PATH).respond_with_handler(wait)
    try:
        with pytest.raises(ProviderError, match="in time") as caught:
            _complete(make(model_timeout_seconds=0.2))
    finally:
        asked_too_long.set()
    assert caught.value.retryable


def test_an_unreachable_server_is_retryable(make: MakeProvider, unused_port: int) -> None:
    with pytest.raises(ProviderError, match="can't be reached") as caught:
        _complete(make(openai_base_url=f"http://127.0.0.1:{unused_port}/v1"))
    assert caught.value.retryable


def test_openais_own_server_needs_a_key() -> None:
    with pytest.raises(SettingsError, match="TRUEUP_OPENAI_API_KEY"):
        provider_from_settings(Settings(model_provider="openai"))


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(make: MakeProvider) -> None:
    with pytest.raises(SettingsError, match="TRUEUP_OPENAI_API_KEY") as caught:
        make(openai_api_key="sk-“quoted”")
    assert "quoted" not in str(caught.value)


def test_a_local_server_needs_no_key(
    httpserver: HTTPServer, make: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body())
    _complete(make(openai_api_key=None))
    request, _ = httpserver.log[0]
    assert "sk-of-somebody-else" not in request.headers["Authorization"]


def test_a_lone_surrogate_is_sent_replaced(httpserver: HTTPServer, make: MakeProvider) -> None:
    httpserver.expect_oneshot_request(PATH).respond_with_json(_body(choices=_choice("\ud800!")))
    done = make().complete([Message(role="user", content="a\ud800b")], max_completion_tokens=5)
    assert json.loads(httpserver.log[0][0].data)["messages"][0]["content"] == "a\ufffdb"
    assert done.text == "\ufffd!"


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that is bound without a listener, so that it refuses connections while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
