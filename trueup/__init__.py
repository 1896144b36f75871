"""trueup makes AI token budgets true: it gates, records and reconciles the tokens that Celery tasks spend.

A host imports the names below. Python loads a name's module when the name is first used, so `import trueup` loads
neither Celery nor SQLAlchemy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded at once: Celery rebuilds a task's error as our class only if its module is loaded by then. It needs no package.
from trueup import errors as errors

if TYPE_CHECKING:
    from trueup.billing.decorators import (
        ai_tokens,
        check_tokens_for_function,
        require_active_subscription,
        require_ai_tokens,
    )
    from trueup.billing.streaming import astream_with_tokens, stream_with_tokens
    from trueup.billing.utils import check_ai_access_for_user, get_accurate_tokens_remaining
    from trueup.errors import (
        HoldBusyError,
        HoldExhaustedError,
        InvalidInputError,
        NoHoldError,
        NotInstalledError,
        ProviderError,
        ServiceUnavailableError,
        TaskIdReusedError,
        TokensDenied,
        TrueupError,
        UnboundedCallError,
        UnmeteredCallError,
    )
    from trueup.llm.model import AsyncModel, Completion, Message, Model
    from trueup.llm.running import spending_from
    from trueup.llm.transport.clients import async_http_client, genai_http_options, http_client
    from trueup.tasks.metered import metered_task
    from trueup.usage.charge_events import ChargeEvent
    from trueup.usage.tracker import ai_usage, track_ai_usage
    from trueup.worker.upkeep import add_upkeep

__all__ = [
    "AsyncModel",
    "ChargeEvent",
    "Completion",
    "HoldBusyError",
    "HoldExhaustedError",
    "InvalidInputError",
    "Message",
    "Model",
    "NoHoldError",
    "NotInstalledError",
    "ProviderError",
    "ServiceUnavailableError",
    "TaskIdReusedError",
    "TokensDenied",
    "TrueupError",
    "UnboundedCallError",
    "UnmeteredCallError",
    "add_upkeep",
    "ai_tokens",
    "ai_usage",
    "astream_with_tokens",
    "async_http_client",
    "check_ai_access_for_user",
    "check_tokens_for_function",
    "genai_http_options",
    "get_accurate_tokens_remaining",
    "http_client",
    "metered_task",
    "require_active_subscription",
    "require_ai_tokens",
    "spending_from",
    "stream_with_tokens",
    "track_ai_usage",
]

# Type checkers read the imports above, Python reads this table. A test compares both with `__all__`.
_MODULES = {
    "AsyncModel": "trueup.llm.model",
    "ChargeEvent": "trueup.usage.charge_events",
    "Completion": "trueup.llm.model",
    "HoldBusyError": "trueup.errors",
    "HoldExhaustedError": "trueup.errors",
    "InvalidInputError": "trueup.errors",
    "Message": "trueup.llm.model",
    "Model": "trueup.llm.model",
    "NoHoldError": "trueup.errors",
    "NotInstalledError": "trueup.errors",
    "ProviderError": "trueup.errors",
    "ServiceUnavailableError": "trueup.errors",
    "TaskIdReusedError": "trueup.errors",
    "TokensDenied": "trueup.errors",
    "TrueupError": "trueup.errors",
    "UnboundedCallError": "trueup.errors",
    "UnmeteredCallError": "trueup.errors",
    "add_upkeep": "trueup.worker.upkeep",
    "ai_tokens": "trueup.billing.decorators",
    "ai_usage": "trueup.usage.tracker",
    "astream_with_tokens": "trueup.billing.streaming",
    "async_http_client": "trueup.llm.transport.clients",
    "check_ai_access_for_user": "trueup.billing.utils",
    "check_tokens_for_function": "trueup.billing.decorators",
    "genai_http_options": "trueup.llm.transport.clients",
    "get_accurate_tokens_remaining": "trueup.billing.utils",
    "http_client": "trueup.llm.transport.clients",
    "metered_task": "trueup.tasks.metered",
    "require_active_subscription": "trueup.billing.decorators",
    "require_ai_tokens": "trueup.billing.decorators",
    "spending_from": "trueup.llm.running",
    "stream_with_tokens": "trueup.billing.streaming",
    "track_ai_usage": "trueup.usage.tracker",
}


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Load a public name from its module and keep it. Raises AttributeError for any other name."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
