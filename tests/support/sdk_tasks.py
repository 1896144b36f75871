"""Metered tasks whose bodies call the makers' SDKs. A worker registers them with `-I tests.support.sdk_tasks`."""

from collections.abc import Callable
from typing import Any

from trueup import genai_http_options, http_client
from trueup.accounts.user_ids import UserId
from trueup.tasks import metered_task

LENGTH = 20  # tokens of an answer


def _openai(url: str, text: str, stream: bool) -> str:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="test", http_client=http_client())
    messages: Any = [{"role": "user", "content": text}]
    if not stream:
        answer = client.responses.create(model="gpt-4o-mini", input=text, max_output_tokens=LENGTH)
        return answer.output_text
    parts = client.chat.completions.create(model="gpt-4o-mini", messages=messages, max_tokens=LENGTH, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts)


def _anthropic(url: str, text: str, stream: bool) -> str:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="test", http_client=http_client())
    ask: Any = {"model": "claude-test", "max_tokens": LENGTH, "messages": [{"role": "user", "content": text}]}
    if stream:
        with client.messages.stream(**ask) as events:
            return "".join(events.text_stream)
    return "".join(block.text for block in client.messages.create(**ask).content if block.type == "text")


def _gemini(url: str, text: str, stream: bool) -> str:
    from google import genai

    http = genai_http_options()
    http.base_url = url
    client = genai.Client(api_key="test", http_options=http)
    config: Any = {"max_output_tokens": LENGTH}
    if stream:
        chunks = client.models.generate_content_stream(model="gemini-2.5-flash", contents=text, config=config)
        return "".join(chunk.text or "" for chunk in chunks)
    return client.models.generate_content(model="gemini-2.5-flash", contents=text, config=config).text or ""


def _pydantic_ai(url: str, text: str, stream: bool) -> str:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    from trueup import async_http_client

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="test", http_client=async_http_client())
    agent = Agent(OpenAIChatModel("gpt-4o-mini", provider=provider), model_settings={"max_tokens": LENGTH})
    return agent.run_sync(text).output


SDKS: dict[str, Callable[[str, str, bool], str]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "google-genai": _gemini,
    "pydantic-ai": _pydantic_ai,
}
CALLS = 4


@metered_task(name="test.sdk_mix", feature_name="SDKs", estimated_tokens=400, max_retries=20)
def mix(user_id: UserId, sdk: str, url: str, number: int) -> int:
    """Make some calls, complete and streamed, two of them equal. Returns the count of words."""
    ask = SDKS[sdk]
    answers = [ask(url, f"question {number} {call % (CALLS - 1)}", call % 2 == 1) for call in range(CALLS)]
    return sum(len(answer.split()) for answer in answers)
