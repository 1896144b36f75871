"""Bounds of prompts for models whose tokenizer is not known: set, or learned from what providers report."""

from typing import Any

import openai
import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import Maker
from tests.support.work import hold_tokens
from trueup import http_client
from trueup.errors import HoldExhaustedError, SettingsError
from trueup.llm.bounds import LEAST_SAMPLES, forget_ratios
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers import provider_from_settings
from trueup.llm.running import spending_from
from trueup.llm.text_classes import classes_of
from trueup.llm.tokens import EncodingCounter
from trueup.settings.settings import get_settings

PERSIAN = "برای بازگرداندن کالا تا هفت روز پس از دریافت سفارش فرصت دارید و هزینه ارسال با فروشگاه است. " * 20
TOKENS = EncodingCounter("o200k_base").count(PERSIAN)


@pytest.fixture(autouse=True)
def _nothing_learned() -> None:
    forget_ratios()


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(1_000_000)


def ask(maker: Maker, text: str) -> None:
    messages: Any = [{"role": "user", "content": text}]
    with openai.OpenAI(base_url=f"{maker.url}/v1", api_key="test", http_client=http_client()) as client:
        client.chat.completions.create(model="llama-3-8b", messages=messages)


def bound_of(maker: Maker, connection: Connection, user: int, text: str) -> int:
    """Return the bound of a prompt: what a large hold leaves for the answer tells it."""
    with spending_from(hold_tokens(connection, user, 100_000)):
        ask(maker, text)
    return 100_000 - int(maker.requests[-1]["max_tokens"])


def test_a_ratio_is_learned_from_reported_prompts_and_known_to_all_workers(
    maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    bounds = [bound_of(maker, connection, user, f"{number} {PERSIAN}") for number in range(LEAST_SAMPLES + 1)]
    assert all(bound > len(PERSIAN.encode()) for bound in bounds[:LEAST_SAMPLES])
    assert TOKENS < bounds[-1] < 2 * TOKENS
    forget_ratios()  # another worker, which knows only what the database has
    assert TOKENS < bound_of(maker, connection, user, f"again {PERSIAN}") < 2 * TOKENS
    assert host.value("SELECT count(*) FROM trueup.prompt_ratio") == 1


def test_what_was_learned_of_prose_says_nothing_about_other_kinds_of_text(
    maker: Maker, connection: Connection, user: int
) -> None:
    for number in range(LEAST_SAMPLES):
        bound_of(maker, connection, user, f"{number} {PERSIAN}")
    keys = "9f86d081884c7d659a2feaa0c55ad015 " * 60
    assert bound_of(maker, connection, user, keys) > len(keys)


def test_a_higher_ratio_raises_the_bound_at_once(maker: Maker, host: Host, connection: Connection, user: int) -> None:
    for number in range(LEAST_SAMPLES):
        bound_of(maker, connection, user, f"{number} {PERSIAN}")
    before = host.value("SELECT highest FROM trueup.prompt_ratio")
    maker.prompt_factor = 1.3
    bound_of(maker, connection, user, f"more {PERSIAN}")
    assert host.value("SELECT highest FROM trueup.prompt_ratio") > 1.2 * before


def test_the_settings_decide_the_bound_where_they_name_a_tokenizer_or_a_ratio(
    maker: Maker, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(PERSIAN.encode())
    cases = (('{"tokenizer": "o200k_base"}', TOKENS), ('{"ratio": 0.5}', size // 2))
    for value, least in cases:
        monkeypatch.setenv("TRUEUP_MODELS", f'{{"llama*": {value}}}')
        get_settings.cache_clear()
        assert least <= bound_of(maker, connection, user, PERSIAN) <= least + 300
    assert host.value("SELECT count(*) FROM trueup.prompt_ratio") == 0
    monkeypatch.setenv("TRUEUP_MODELS", '{"llama*": {"tokenizer": "cl100k"}}')
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match="tokenizer"):
        get_settings()


def test_the_model_client_learns_too(
    maker: Maker, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "openai")
    monkeypatch.setenv("TRUEUP_MODEL_NAME", "llama-3-8b")
    monkeypatch.setenv("TRUEUP_OPENAI_BASE_URL", f"{maker.url}/v1")
    get_settings.cache_clear()
    model = MeteredModel(lambda: provider_from_settings(get_settings()))

    def buy(number: int) -> None:
        with spending_from(hold_tokens(connection, user, 2 * TOKENS)):
            model.complete([Message(role="user", content=f"{number} {PERSIAN}")])

    with pytest.raises(HoldExhaustedError):
        buy(0)
    for number in range(LEAST_SAMPLES):
        with spending_from(hold_tokens(connection, user, 10_000)):
            model.complete([Message(role="user", content=f"{number} {PERSIAN}")])
    buy(LEAST_SAMPLES)
    assert host.value("SELECT samples FROM trueup.prompt_ratio") == LEAST_SAMPLES


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("How do I return an order?", "latin"),
        ("Siparişimi nasıl iade ederim?", "latin"),
        (PERSIAN, "arabic"),
        ("如何退货，运费由谁承担", "cjk"),
        ("Как вернуть заказ?", "cyrillic"),
        ("9f86d081884c7d659a2feaa0c55ad015", "latin dense"),
        ('{"a":1,"b":[2,3]}', "latin dense"),
        (" " * 50 + "a", "blank"),
        ("😀😀😀", "other dense"),
    ],
)
def test_texts_are_told_apart_by_script_and_density(text: str, kind: str) -> None:
    assert {found for found, _ in classes_of(text)} == {kind}
