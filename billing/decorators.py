"""The specification's checks for code outside of views."""

from typing import Any

from billing.access import Access
from billing.utils import check_ai_access_for_user


def check_tokens_for_function(user: Any, estimated_tokens: int = 1500, feature_name: str = "AI Feature") -> Access:
    """Say whether a task or service may use AI for the user; see `billing.utils.check_ai_access_for_user`."""
    return check_ai_access_for_user(user, estimated_tokens, feature_name)
