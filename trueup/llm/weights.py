"""How much the tokens of a call count against the budget: by their class, and by the model."""

from dataclasses import replace
from decimal import ROUND_CEILING, Decimal

from trueup.llm.formats.usage import CLASSES, TokenUsage
from trueup.llm.output_cap import Demand
from trueup.settings.models import settings_of_model
from trueup.settings.settings import Settings

_PROMPT_CLASSES = ("input", "cached_input", "cache_write", "audio", "other")
_ANSWER_CLASSES = ("output", "reasoning", "audio", "other")


def counted_tokens(usage: TokenUsage, model_name: str, settings: Settings) -> int:
    """Return what the usage counts against the budget, rounded up once."""
    if not settings.count and not settings.models:
        return usage.total
    weights = _weights(settings)
    counted = sum((weights[name] * tokens for name, tokens in usage.classes().items()), Decimal())
    return int((counted * _of_model(model_name, settings)).to_integral_value(ROUND_CEILING))


def weighted(demand: Demand, model_name: str, settings: Settings) -> Demand:
    """Return the demand of a call with the weights by which its prompt and its answer count at most."""
    if not settings.count and not settings.models:
        return demand
    weights, of_model = _weights(settings), _of_model(model_name, settings)
    return replace(
        demand,
        prompt_weight=of_model * max(weights[name] for name in _PROMPT_CLASSES),
        answer_weight=of_model * max(weights[name] for name in _ANSWER_CLASSES),
    )


def _weights(settings: Settings) -> dict[str, Decimal]:
    given = {str(name): weight for name, weight in settings.count.items()}
    return {name: given.get(name, Decimal(1)) for name in CLASSES}


def _of_model(name: str, settings: Settings) -> Decimal:
    return settings_of_model(settings.models, name).weight
