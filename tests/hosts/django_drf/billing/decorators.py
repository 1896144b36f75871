"""The project's path to the checks for views, tasks and services."""

from trueup import ai_tokens, check_tokens_for_function, require_active_subscription, require_ai_tokens

__all__ = ["ai_tokens", "check_tokens_for_function", "require_active_subscription", "require_ai_tokens"]
