"""How much tokens count: by class and by model."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import openai
import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import Maker
from tests.support.work import hold_tokens
from trueup import http_client
from trueup.errors import HoldExhaustedError
from trueup.llm.formats.usage import split_usage
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.output_cap import Demand
from trueup.llm.providers import provider_from_settings
from trueup.llm.running import spending_from
from trueup.llm.weights import counted_tokens
from trueup.settings.models import ModelSettings, settings_of_model
from trueup.settings.settings import Settings, get_settings

Ask = Callable[[Maker], None]
ASK: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a question of some length"}]}


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(100_000)


def by_sdk(maker: Maker) -> None:
    with openai.OpenAI(base_url=f"{maker.url}/v1", api_key="test", http_client=http_client()) as client:
        client.chat.completions.create(**ASK)


def by_model_client(maker: Maker) -> None:
    given = {"model_provider": "openai", "openai_base_url": f"{maker.url}/v1", "model_name": ASK["model"]}
    settings = get_settings().model_copy(update=given)
    model = MeteredModel(lambda: provider_from_settings(settings))
    model.complete([Message(**message) for message in ASK["messages"]])


@pytest.fixture(params=[by_sdk, by_model_client])
def ask(request: pytest.FixtureRequest) -> Ask:
    asked: Ask = request.param
    return asked


def test_a_charge_keeps_each_class_of_tokens(
    ask: Ask, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.reasoning, maker.cached = 7, 4
    with spending_from(hold_tokens(connection, user, 500)):
        ask(maker)
    prompt = maker.ledger[0].prompt
    columns = host.execute(
        "SELECT tokens_input, tokens_cached_input, tokens_cache_write, tokens_output, tokens_reasoning, tokens_audio, "
        "tokens_total FROM trueup.charge"
    ).one()
    assert tuple(columns) == (prompt - 4, 4, 0, 20, 7, 0, prompt + 27)
    metadata = host.value("SELECT metadata FROM ai_usage_log")
    assert metadata["tokens"] == {"input": prompt - 4, "cached_input": 4, "output": 20, "reasoning": 7}


def test_the_settings_weights_decide_what_counts_and_what_is_held(
    ask: Ask, maker: Maker, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_COUNT", '{"cached_input": 0.1, "output": 3}')
    monkeypatch.setenv("TRUEUP_MODELS", '{"gpt-4o*": {"weight": 2}}')
    get_settings.cache_clear()
    maker.cached = 5
    with spending_from(hold_tokens(connection, user, 500)):
        ask(maker)
    prompt = maker.ledger[0].prompt
    # 2 × (fresh + 0.1 × 5 cached + 3 × 20 made)
    assert host.used(user) == 2 * (prompt - 5) + 1 + 120
    assert maker.requests[0]["max_tokens"] == (500 - 2 * prompt) // 6
    row = host.execute("SELECT prompt_tokens, completion_tokens FROM ai_usage_log").one()
    assert tuple(row) == (prompt, 20)


def test_a_weight_makes_a_call_too_large_for_its_hold(
    ask: Ask, maker: Maker, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_MODELS", '{"gpt-4o*": {"weight": 50}}')
    get_settings.cache_clear()
    with spending_from(hold_tokens(connection, user, 200)), pytest.raises(HoldExhaustedError):
        ask(maker)
    assert maker.paths == []


@pytest.mark.parametrize(
    ("weight", "tokens", "counted"), [("0.1", 1, 1), ("0.1", 10, 1), ("0.1", 11, 2), ("0", 9, 0), ("1.5", 3, 5)]
)
def test_a_charge_is_rounded_up_once(weight: str, tokens: int, counted: int) -> None:
    settings = Settings(count={"input": Decimal(weight)})
    assert counted_tokens(split_usage(prompt=tokens, completion=0), "any", settings) == counted


@pytest.mark.parametrize("tokens", range(0, 60, 7))
def test_the_cost_of_the_largest_cap_is_covered(tokens: int) -> None:
    demand = Demand(prompt_tokens=7, choices=2, prompt_weight=Decimal("0.3"), answer_weight=Decimal("1.7"))
    limit = demand.limit(tokens)
    if limit > 0:
        assert demand.cost(limit) <= tokens < demand.cost(limit + 1)


def test_the_longest_pattern_that_fits_decides() -> None:
    models = {"gpt-*": ModelSettings(weight=Decimal(2)), "gpt-5*": ModelSettings(weight=Decimal(5))}
    weights = {name: settings_of_model(models, name).weight for name in ("GPT-5-mini", "openai/gpt-4o", "llama-3")}
    assert weights == {"GPT-5-mini": 5, "openai/gpt-4o": 2, "llama-3": 1}
