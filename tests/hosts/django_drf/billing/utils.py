"""The project's path to the numbers of the usage log."""

from trueup import check_ai_access_for_user, get_accurate_tokens_remaining

__all__ = ["check_ai_access_for_user", "get_accurate_tokens_remaining"]
