"""A model's server in the test's own process: it takes the requests of OpenAI's SDK, and bills what the test says."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai

from trueup.llm.model import Message
from trueup.llm.providers.failures import Failures
from trueup.llm.providers.maker import MakerProvider
from trueup.llm.providers.openai import OpenAI
from trueup.llm.providers.paying_client import PayingClient
from trueup.llm.tokens import EncodingCounter, count_prompt_tokens
from trueup.settings.settings import Settings

MODEL_NAME = "gpt-4o-mini"
_COUNTER = EncodingCounter("o200k_base")


def prompt_of(tokens: int) -> list[Message]:
    """Return a prompt that costs so many tokens."""
    messages = [Message(role="user", content="")]
    words = tokens - count_prompt_tokens(messages, _COUNTER)
    return [Message(role="user", content=" token" * words)]


class Answering(httpx2.BaseTransport):
    """Answers with a fixed usage, and records the caps of its calls.

    `billed`: the tokens of each answer. `status`: of a refusal of each call. `happens`: called with each request's body
    before the answer.
    """

    def __init__(
        self, *, billed: int = 30, status: int = 200, happens: Callable[[dict[str, Any]], object] = lambda asked: None
    ) -> None:
        self.billed = billed
        self.status = status
        self.happens = happens
        self.caps: list[int] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.read())
        self.caps.append(asked["max_tokens"])
        self.happens(asked)
        if self.status != 200:
            return httpx2.Response(self.status, json={"error": {"message": "out of order", "code": "test"}})
        messages = [Message(role=message["role"], content=message["content"]) for message in asked["messages"]]
        prompt = count_prompt_tokens(messages, _COUNTER)
        message = {"role": "assistant", "content": self.text(messages[-1].content)}
        usage = {"prompt_tokens": prompt, "completion_tokens": self.billed, "total_tokens": prompt + self.billed}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return httpx2.Response(200, json={"model": "answering", "choices": [choice], "usage": usage})

    def text(self, question: str) -> str:
        return f"answer {len(self.caps)}"


def provider_over(server: httpx2.BaseTransport, model_name: str = MODEL_NAME) -> MakerProvider:
    """Return the provider `openai`, whose requests this server takes. The SDK does not repeat them."""
    settings = Settings(model_provider="openai", model_name=model_name, model_max_retries=0)
    http = PayingClient(root=openai.OpenAIError, answer_seconds=30, inner=server)
    url = "http://model.invalid/v1"
    failures = Failures(url, "", key_name="", url_name="", connection_errors=OpenAI.connection_errors)
    return MakerProvider(OpenAI(url, "none", settings, http), http, failures)
