"""`hold.output_tokens`: the longest answer that a hold covers after the prompt."""

from typing import Any

import pytest

from tests.support.host import Host
from trueup.billing.decorators import ai_tokens
from trueup.errors import InvalidInputError, NoHoldError
from trueup.llm.model import Message
from trueup.llm.tokens import count_prompt_tokens, counter_for
from trueup.settings.settings import get_settings

LONG = "The return of goods is free within seven days. " * 40


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000)


@pytest.mark.parametrize("prompt", ["Are returns free?", ["You answer briefly.", LONG], ""])
def test_the_answers_cap_and_the_prompt_together_are_what_the_hold_has(user: int, prompt: Any) -> None:
    with ai_tokens(user, 1_500) as hold:
        texts = [prompt] if isinstance(prompt, str) else prompt
        cost = count_prompt_tokens([Message(role="user", content=part) for part in texts], counter_for("gpt-4o"))
        assert hold.output_tokens(prompt, model_name="gpt-4o") == 1_500 - cost
        assert hold.output_tokens(prompt, model_name="gpt-4o", thinking_tokens=200) == 1_300 - cost
        # An unknown tokenizer: never more than a known one allows.
        assert hold.output_tokens(prompt, model_name="llama-3") <= 1_500 - cost
        hold.charge(prompt_tokens=1_300, completion_tokens=100, model_name="m")
        assert hold.output_tokens(prompt, model_name="gpt-4o") == max(0, 100 - cost)


def test_the_cap_counts_as_the_settings_weigh_the_model(user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_MODELS", '{"gpt-4o": {"weight": 5}}')
    get_settings.cache_clear()
    with ai_tokens(user, 1_500) as hold:
        cost = count_prompt_tokens([Message(role="user", content=LONG)], counter_for("gpt-4o"))
        assert hold.output_tokens("Hi", model_name="gpt-4o") <= 1_500 // 5
        assert hold.output_tokens(LONG, model_name="gpt-4o") == max(0, (1_500 - 5 * cost) // 5)


def test_a_prompt_that_the_hold_does_not_cover_leaves_no_answer(user: int) -> None:
    with ai_tokens(user, 100) as hold:
        assert hold.output_tokens(LONG, model_name="gpt-4o") == 0


def test_a_wrong_prompt_or_a_block_that_is_over_has_no_cap(user: int) -> None:
    with ai_tokens(user, 100) as hold:
        for wrong, more, field in (
            ([1], {}, "prompt"),
            ({"text": "the body of a request"}, {}, "prompt"),
            (None, {}, "prompt"),
            ("a", {"thinking_tokens": -1}, "thinking_tokens"),
            ("a", {"model_name": ""}, "model_name"),
        ):
            with pytest.raises(InvalidInputError, match=field):
                hold.output_tokens(wrong, **more)  # type: ignore[arg-type]
    with pytest.raises(NoHoldError):
        hold.output_tokens("a")
